"""What ranks cost, and what a plan is made of."""

from __future__ import annotations

from fractions import Fraction

from bs_exp.errors import ConfigError
from bs_exp.protocols import AllocationProblem, Layout
from bs_exp.types import PlannedGroup, RankPlan, Spectrum, WeightGroup


def check_retain_ratio(ratio: float) -> None:
    """Raises ConfigError unless the ratio lies in (0, 1]."""
    if not 0.0 < ratio <= 1.0:
        raise ConfigError(
            f"retain_ratio must be above 0 and at most 1 (the share of the targeted parameters to keep), got {ratio}. "
            "A compression ratio of 20 % is retain_ratio=0.8."
        )


def parameter_budget(group_parameters: int, ratio: float) -> int:
    """Whole parameters within a share, taken as the decimal it was written as: in binary 0.57 * 100 is below 57."""
    return int(Fraction(repr(ratio)) * group_parameters)


def largest_rank(group: WeightGroup, parameters: int, layout: Layout) -> int:
    """The largest rank that costs at most so many parameters; 0 if not even one component fits.

    For the plain layout `floor(ratio * n * d_in * d_out / (d_in + n * d_out))` (Basis Sharing, section 3.3).
    """
    low, high = 0, group.full_rank
    while low < high:  # the cost of every layout grows with the rank
        middle = (low + high + 1) // 2
        low, high = (middle, high) if layout.parameters(group, middle) <= parameters else (low, middle - 1)
    return low


def planned(spectrum: Spectrum, rank: int | None, layout: Layout) -> PlannedGroup:
    """The plan's entry for a group at a rank; None leaves it dense."""
    group = spectrum.group
    return PlannedGroup(
        group=group,
        rank=rank,
        parameters=group.parameters if rank is None else layout.parameters(group, rank),
        predicted_loss=spectrum.loss(rank),
        ridge=spectrum.ridge,
        damping=spectrum.damping,
        loss_unit=spectrum.unit,
    )


def make_plan(problem: AllocationProblem, ranks: list[int | None]) -> RankPlan:
    """The plan that gives the problem's groups these ranks."""
    groups = tuple(planned(s, rank, problem.layout) for s, rank in zip(problem.spectra, ranks, strict=True))
    return RankPlan(groups=groups, requested_ratio=problem.retain_ratio, layout=problem.layout.name)
