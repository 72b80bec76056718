"""Rounds of equal steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bs_exp.validation import check_share, check_step


@dataclass(frozen=True, kw_only=True)
class EqualSteps:
    """Each round removes `size` of the targeted parameters; the last one takes what is left, up to 1.5 `size`.

    Each round gathers the statistics anew on the model compressed so far, and factorises the original weights in that
    metric, so that the quadratic model of the loss is used for small steps only.
    """

    size: float

    def __post_init__(self) -> None:
        check_share(above=0.0, size=self.size)
        check_step(size=self.size)

    def next_ratio(self, current: float, target: float, loss_at: Callable[[float], float]) -> float:
        # Rounded: ratios are decimals in records and keys, and 1 - 3 * 0.05 is not 0.85 in binary.
        proposal = round(current - self.size, 6)
        return target if proposal - target < 0.5 * self.size else proposal
