"""In how many rounds a schedule will compress, as far as that is known before there are losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from bs_exp.contracts import check_ratio
from bs_exp.pipeline import Recipe


@dataclass(frozen=True)
class Rounds:
    """The retained share after each round, of the most rounds that there can be, and the least number of them."""

    ratios: tuple[float, ...]
    least: int

    @property
    def told(self) -> str:
        most = len(self.ratios)
        return f"{most} round{'s' * (most > 1)}" if most == self.least else f"{self.least} to {most} rounds"


def rounds_of(recipe: Recipe) -> Rounds:
    """The rounds of a recipe. A schedule that asks for losses is asked twice: with none, and with endless ones."""
    few = _ratios(recipe, lambda current: lambda ratio: 0.0)
    many = _ratios(recipe, lambda current: lambda ratio: 0.0 if ratio >= current else math.inf)
    longest = max(few, many, key=len)
    return Rounds(longest, min(len(few), len(many)))


def _ratios(recipe: Recipe, losses: Callable[[float], Callable[[float], float]]) -> tuple[float, ...]:
    ratios: list[float] = []
    current = 1.0
    while True:
        following = recipe.schedule.next_ratio(current, recipe.retain_ratio, losses(current))
        check_ratio(following, current, recipe.retain_ratio, recipe.schedule)
        ratios.append(following)
        if following <= recipe.retain_ratio:
            return tuple(ratios)
        current = following
