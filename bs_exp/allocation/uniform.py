"""The same share of parameters for every group."""

from __future__ import annotations

from dataclasses import dataclass

from bs_exp.allocation.budget import check_retain_ratio, largest_rank, make_plan, parameter_budget
from bs_exp.errors import ConfigError
from bs_exp.protocols import AllocationProblem
from bs_exp.types import RankPlan, WeightGroup


@dataclass(frozen=True, kw_only=True)
class UniformAllocation:
    """Every group keeps `retain_ratio` of its parameters, its rank rounded down; a ratio of 1 leaves all dense.

    SVD-LLM (2403.07378), section 3; Basis Sharing (2410.03765), section 3.3. The official code gives a shorter last
    group a full group's rank, which overshoots the budget; here each group counts its own layers.
    """

    def allocate(self, problem: AllocationProblem) -> RankPlan:
        """Ranks at or below the budget.

        Raises ConfigError if some group would be left without a single component.
        """
        check_retain_ratio(problem.retain_ratio)
        return make_plan(problem, [self._rank(spectrum.group, problem) for spectrum in problem.spectra])

    def _rank(self, group: WeightGroup, problem: AllocationProblem) -> int | None:
        ratio, layout = problem.retain_ratio, problem.layout
        if ratio == 1.0:
            return None
        rank = largest_rank(group, parameter_budget(group.parameters, ratio), layout)
        if rank < 1:
            raise ConfigError(
                f"retain_ratio {ratio} leaves {group.name} ({group.d_in} x {group.columns}) without a single "
                f"component; one component needs {layout.parameters(group, 1) / group.parameters:.4f}. "
                "Raise retain_ratio."
            )
        return rank
