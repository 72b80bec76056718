"""Ranks by the truncation loss of each matrix, over depth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from bs_exp.errors import ConfigError
from bs_exp.protocols import AllocationProblem, Layout
from bs_exp.rank_budget import by_type, check_affordable, largest_rank, make_plan, parameter_budget, share_out
from bs_exp.types import RankPlan, Spectrum, Statistic, WeightGroup


@dataclass(frozen=True, kw_only=True)
class SvdLlmV2:
    """Within a matrix type the removed share of a matrix is in proportion to `1 / log(L)`.

    `L = ||X (W - W_k)||_F` is its loss at the uniform rank: `removed_w = N * (1 - ratio) * l_w / sum(l)` with
    `l = 1 / log(L)` and N matrices of the type. Every matrix keeps at least one component; what it cannot give up is
    taken from the others. The logarithm depends on the scale of L: L must be above 1, and the plan changes with the
    number of calibration tokens.
    SVD-LLM v2 (2503.12340), section 3.1.
    """

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def check(self, groups: tuple[WeightGroup, ...], retain_ratio: float, layout: Layout) -> None:
        check_affordable(groups, retain_ratio, layout, pool=by_type)

    def allocate(self, problem: AllocationProblem) -> RankPlan:
        """Ranks that spend the budget up to less than one component.

        Raises ConfigError if one component per group exceeds the budget of its type, or a loss has no positive
        logarithm.
        """
        self.check(tuple(s.group for s in problem.spectra), problem.retain_ratio, problem.layout)
        if problem.retain_ratio == 1.0:
            return make_plan(problem, [None] * len(problem.spectra))
        removed = [1.0 / _log_loss(spectrum, problem) for spectrum in problem.spectra]
        return make_plan(problem, share_out(problem, removed, removing=True, pool=by_type))


def _log_loss(spectrum: Spectrum, problem: AllocationProblem) -> float:
    group = spectrum.group
    kept = parameter_budget(group.parameters, problem.retain_ratio)
    loss = spectrum.loss(max(1, largest_rank(group, kept, problem.layout)))
    if spectrum.unit.is_second_order or loss <= 1.0:
        raise ConfigError(
            f"allocation=svd_llm_v2 weighs matrices by 1/log(loss), so every loss must be a norm above 1; {group.name} "
            f"has {loss:.4g} ({spectrum.unit.value}) at retain_ratio {problem.retain_ratio}. Use whitening=gram with "
            "more calibration tokens, or another allocation."
        )
    return math.log(loss)
