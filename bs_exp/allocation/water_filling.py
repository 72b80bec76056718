"""Ranks where they pay: the least total loss over all groups under one parameter budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bs_exp.allocation.budget import (
    Choices,
    check_affordable,
    cost_of,
    make_plan,
    parameter_budget,
    spectrum_choices,
    spend,
)
from bs_exp.checks import check_share
from bs_exp.protocols import AllocationProblem, Layout
from bs_exp.types import RankPlan, Statistic, WeightGroup


@dataclass(frozen=True, kw_only=True)
class WaterFilling:
    """Minimises the sum of the groups' predicted losses under one parameter budget.

    For a price per parameter every group picks its own best rank, or stays dense; the price is bisected until the
    budget is met, and what is left goes to the best saving per parameter that still fits. With the plain layout that is
    components in the order of what they save per parameter, the optimum of the separable convex problem. No group keeps
    less than `min_ratio` of its parameters. The losses must have one unit, so use whitening=two_sided: losses in
    `||X dW||` differ in scale between matrix types, and spending by them is harmful.
    """

    min_ratio: float

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __post_init__(self) -> None:
        check_share(min_ratio=self.min_ratio)

    def check(self, groups: tuple[WeightGroup, ...], retain_ratio: float, layout: Layout) -> None:
        check_affordable(groups, retain_ratio, layout, lowest=self.min_ratio)

    def allocate(self, problem: AllocationProblem) -> RankPlan:
        """Ranks that spend the budget up to less than one component.

        Raises ConfigError if one component per group, or min_ratio, already exceeds the budget.
        """
        self.check(tuple(s.group for s in problem.spectra), problem.retain_ratio, problem.layout)
        budget = parameter_budget(sum(s.group.parameters for s in problem.spectra), problem.retain_ratio)
        choices = [spectrum_choices(spectrum, problem.layout, lowest=self.min_ratio) for spectrum in problem.spectra]
        chosen = spend(choices, _at_price(choices, budget), budget)
        return make_plan(problem, [c.ranks[i] for c, i in zip(choices, chosen, strict=True)])


def _at_price(choices: list[Choices], budget: int) -> list[int]:
    """Every group's best choice at the lowest price per parameter that keeps the budget."""
    cheap = [c.best(0.0) for c in choices]
    if cost_of(choices, cheap) <= budget:
        return cheap
    low, high = 0.0, 1.0
    while cost_of(choices, [c.best(high) for c in choices]) > budget:
        low, high = high, 2.0 * high
        if high > 1e300:
            return [0] * len(choices)
    for _ in range(200):  # until no number lies between
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        if cost_of(choices, [c.best(middle) for c in choices]) > budget:
            low = middle
        else:
            high = middle
    return [c.best(high) for c in choices]
