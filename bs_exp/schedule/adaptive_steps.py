"""Rounds whose size is limited by the growth of the predicted loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bs_exp.errors import ConfigError
from bs_exp.validation import check_positive, check_share, check_step


@dataclass(frozen=True, kw_only=True)
class AdaptiveSteps:
    """Each round removes as many parameters as raise the predicted loss by `max_loss` over that of the current ratio.

    Steps lie between `min_size` and `max_size` of the targeted parameters. Otherwise as `EqualSteps`. The loss
    is in the metric's unit: nats per token with whitening=two_sided.
    """

    max_loss: float
    min_size: float
    max_size: float

    def __post_init__(self) -> None:
        check_positive(max_loss=self.max_loss)
        check_share(above=0.0, min_size=self.min_size, max_size=self.max_size)
        check_step(min_size=self.min_size)
        if self.min_size > self.max_size:
            raise ConfigError(f"min_size must be at most max_size={self.max_size}, got {self.min_size}.")

    def next_ratio(self, current: float, target: float, loss_at: Callable[[float], float]) -> float:
        smallest = round(current - self.min_size, 6)
        if smallest - target < 0.5 * self.min_size:
            return target
        limit = loss_at(current) + self.max_loss
        low, high = max(target, round(current - self.max_size, 6)), smallest
        if loss_at(low) <= limit:
            return low
        while high - low > 0.1 * self.min_size:  # loss_at(low) is above the limit
            middle = round(0.5 * (low + high), 6)
            low, high = (low, middle) if loss_at(middle) <= limit else (middle, high)
        return target if high - target < 0.5 * self.min_size else high
