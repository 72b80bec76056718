"""Two ways to do the same work, timed in turns: the ratio of their speeds, and whether there is a difference at all.

The speed of a machine changes by more than most compressions gain, within a minute and for reasons of its own. So the
two are timed round by round, and only times of one round are compared with each other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bs_exp.records.metrics import FASTER, NO_DIFFERENCE, SLOWER

# The fewest rounds in which a 95 % interval of a median exists: 2 * 0.5^6 = 3 % of such sets lie all on one side.
FEWEST_ROUNDS = 6


def in_turn(count: int, rounds: int) -> Iterator[int]:
    """Indices of `count` variants, each once per round; every round begins with the next one, since order matters."""
    for number in range(rounds):
        yield from ((number + i) % count for i in range(count))


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % confidence interval of the median, by order statistics; None for fewer than `FEWEST_ROUNDS` values.

    It holds for any distribution of independent values (Conover, Practical Nonparametric Statistics, section 3.2).
    """
    from scipy.stats import quantile_test  # half a second, which runs that time nothing need not wait for

    low, high = quantile_test(values, p=0.5).confidence_interval(0.95)
    return (float(low), float(high)) if math.isfinite(low) and math.isfinite(high) else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Speeds relative to each other: `ratio` is the median over rounds of the second one's speed over the first one's.

    `interval` is the 95 % interval of that median, None with fewer than `FEWEST_ROUNDS` rounds. `drift` is how much the
    speed that both have in common changed from the first half of the rounds to the second: 0.1 is 10 % faster.
    """

    ratio: float
    interval: tuple[float, float] | None
    drift: float

    @property
    def is_difference(self) -> bool:
        """Whether a difference was measured: the interval leaves out 1, and the machine changed by less than that."""
        if self.interval is None or self.interval[0] <= 1.0 <= self.interval[1]:
            return False
        return abs(math.log1p(self.drift)) < abs(math.log(self.ratio))

    @property
    def in_words(self) -> str:
        """`faster`, `slower`, or `no difference measured`, of the second one."""
        if not self.is_difference:
            return NO_DIFFERENCE
        return FASTER if self.ratio > 1.0 else SLOWER


def compare_rounds(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Compares the times (seconds, above 0) of both in the same rounds, in the order in which these were run."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    common = [-0.5 * math.log(a * b) for a, b in zip(first, second, strict=True)]
    half = len(common) // 2  # the round in the middle of an odd number is in neither
    drift = math.expm1(statistics.median(common[-half:]) - statistics.median(common[:half])) if half else 0.0
    return Comparison(ratio=statistics.median(ratios), interval=median_interval(ratios), drift=drift)
