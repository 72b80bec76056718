"""The same share of parameters for every group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bs_exp.errors import ConfigError
from bs_exp.protocols import AllocationProblem, Layout
from bs_exp.rank_budget import (
    largest_rank,
    make_plan,
    nearest_ranks,
    parameter_budget,
    spectrum_choices,
)
from bs_exp.types import RankPlan, Statistic, WeightGroup
from bs_exp.validation import check_retain_ratio


@dataclass(frozen=True, kw_only=True)
class UniformAllocation:
    """Every group keeps `retain_ratio` of its parameters, its rank rounded down; a ratio of 1 leaves all dense.

    With `fill`, the parameters left over by rounding add components where most is missing, until none fits.
    SVD-LLM (2403.07378), section 3; Basis Sharing (2410.03765), section 3.3. The official code gives a shorter last
    group a full group's rank, which overshoots the budget; here each group counts its own layers.
    """

    fill: bool = False

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def check(self, groups: tuple[WeightGroup, ...], retain_ratio: float, layout: Layout) -> None:
        check_retain_ratio(retain_ratio)
        for group in groups:
            if retain_ratio < 1.0 and _rank(group, retain_ratio, layout) < 1:
                raise ConfigError(
                    f"retain_ratio {retain_ratio} leaves {group.name} ({group.d_in} x {group.columns}) without a "
                    f"single component; one component needs {layout.parameters(group, 1) / group.parameters:.4f}. "
                    "Raise retain_ratio."
                )

    def allocate(self, problem: AllocationProblem) -> RankPlan:
        """Ranks at or below the budget; with `fill` less than one component below it.

        Raises ConfigError if some group would be left without a single component.
        """
        groups, ratio, layout = tuple(s.group for s in problem.spectra), problem.retain_ratio, problem.layout
        self.check(groups, ratio, layout)
        if ratio == 1.0:
            return make_plan(problem, [None] * len(groups))
        if not self.fill:
            return make_plan(problem, [_rank(group, ratio, layout) for group in groups])
        choices = [spectrum_choices(spectrum, layout) for spectrum in problem.spectra]
        targets = [parameter_budget(group.parameters, ratio) for group in groups]
        return make_plan(problem, nearest_ranks(problem, choices, targets))


def _rank(group: WeightGroup, ratio: float, layout: Layout) -> int:
    return largest_rank(group, parameter_budget(group.parameters, ratio), layout)
