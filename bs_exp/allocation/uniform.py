"""The same share of parameters for every group."""

from __future__ import annotations

from dataclasses import dataclass

from bs_exp.allocation.budget import check_retain_ratio, component_cost, planned, uniform_rank
from bs_exp.errors import ConfigError
from bs_exp.types import AllocationProblem, PlannedGroup, RankPlan, Spectrum


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
        groups = tuple(self._plan(spectrum, problem.retain_ratio) for spectrum in problem.spectra)
        return RankPlan(groups=groups, requested_ratio=problem.retain_ratio)

    def _plan(self, spectrum: Spectrum, ratio: float) -> PlannedGroup:
        if ratio == 1.0:
            return planned(spectrum, None)
        rank = uniform_rank(spectrum.group, ratio)
        if rank < 1:
            lowest = component_cost(spectrum.group) / spectrum.group.parameters
            raise ConfigError(
                f"retain_ratio {ratio} leaves {spectrum.group.name} ({spectrum.group.d_in} x {spectrum.group.columns}) "
                f"without a single component; one component needs {lowest:.4f}. Raise retain_ratio."
            )
        return planned(spectrum, rank)
