"""What ranks cost, and what a plan is made of."""

from __future__ import annotations

from fractions import Fraction

from bs_exp.errors import ConfigError
from bs_exp.types import PlannedGroup, Spectrum, WeightGroup


def check_retain_ratio(ratio: float) -> None:
    """Raises ConfigError unless the ratio lies in (0, 1]."""
    if not 0.0 < ratio <= 1.0:
        raise ConfigError(
            f"retain_ratio must be above 0 and at most 1 (the share of the targeted parameters to keep), got {ratio}. "
            "A compression ratio of 20 % is retain_ratio=0.8."
        )


def component_cost(group: WeightGroup) -> int:
    """Parameters of one component: a basis column and a coefficient row, `d_in + n * d_out`."""
    return group.d_in + group.columns


def uniform_rank(group: WeightGroup, ratio: float) -> int:
    """`floor(ratio * n * d_in * d_out / (d_in + n * d_out))` with the group's own n (Basis Sharing, section 3.3).

    The ratio is taken as the decimal it was written as: in binary 0.7 * 10 is below 7.
    """
    return int(Fraction(repr(ratio)) * group.parameters / component_cost(group))


def planned(spectrum: Spectrum, rank: int | None) -> PlannedGroup:
    """The plan's entry for a group at a rank; None leaves it dense."""
    group = spectrum.group
    return PlannedGroup(
        group=group,
        rank=rank,
        parameters=group.parameters if rank is None else rank * component_cost(group),
        predicted_loss=spectrum.loss(rank),
        ridge=spectrum.ridge,
    )
