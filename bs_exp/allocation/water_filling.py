"""Ranks where they pay: the least total loss over all groups under one parameter budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bs_exp.allocation.budget import check_retain_ratio, largest_rank, make_plan, parameter_budget
from bs_exp.checks import check_share
from bs_exp.errors import ConfigError
from bs_exp.protocols import AllocationProblem
from bs_exp.types import RankPlan, Spectrum


@dataclass(frozen=True, eq=False)
class _Choices:
    """What one group may choose: ranks (the last choice is dense), their parameters and their losses."""

    ranks: tuple[int | None, ...]
    costs: Tensor
    losses: Tensor

    def best(self, price: float) -> int:
        """The choice with the least `loss + price * parameters`; of equals the cheaper one."""
        return int((self.losses + price * self.costs).argmin())


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

    def __post_init__(self) -> None:
        check_share(min_ratio=self.min_ratio)

    def allocate(self, problem: AllocationProblem) -> RankPlan:
        """Ranks that spend the budget up to less than one component.

        Raises ConfigError if one component per group, or min_ratio, already exceeds the budget.
        """
        check_retain_ratio(problem.retain_ratio)
        budget = parameter_budget(sum(s.group.parameters for s in problem.spectra), problem.retain_ratio)
        choices = [self._choices(spectrum, problem) for spectrum in problem.spectra]
        least = sum(int(c.costs[0]) for c in choices)
        if least > budget:
            total = sum(s.group.parameters for s in problem.spectra)
            raise ConfigError(
                f"retain_ratio {problem.retain_ratio} is below the {least / total:.4f} that one component per group "
                f"with allocation.min_ratio={self.min_ratio} needs. Raise retain_ratio or lower min_ratio."
            )
        chosen = _fill(choices, _at_price(choices, budget), budget)
        return make_plan(problem, [c.ranks[i] for c, i in zip(choices, chosen, strict=True)])

    def _choices(self, spectrum: Spectrum, problem: AllocationProblem) -> _Choices:
        group = spectrum.group
        lowest = max(1, largest_rank(group, parameter_budget(group.parameters, self.min_ratio), problem.layout))
        costs = [problem.layout.parameters(group, rank) for rank in range(lowest, group.full_rank)]
        ranks = [rank for rank, cost in enumerate(costs, start=lowest) if cost < group.parameters]
        # tail[k] = energies[k:].sum(), added from the small end
        tail = spectrum.energies.double().cpu().flip(0).cumsum(0).flip(0)
        losses = [*(float(tail[rank]) for rank in ranks), 0.0]
        return _Choices(
            ranks=(*ranks, None),
            costs=torch.tensor([*costs[: len(ranks)], group.parameters], dtype=torch.float64),
            losses=torch.tensor(losses, dtype=torch.float64),
        )


def _cost(choices: list[_Choices], chosen: list[int]) -> int:
    return sum(int(c.costs[i]) for c, i in zip(choices, chosen, strict=True))


def _at_price(choices: list[_Choices], budget: int) -> list[int]:
    """Every group's best choice at the lowest price per parameter that keeps the budget."""
    cheap = [c.best(0.0) for c in choices]
    if _cost(choices, cheap) <= budget:
        return cheap
    low, high = 0.0, 1.0
    while _cost(choices, [c.best(high) for c in choices]) > budget:
        low, high = high, 2.0 * high
        if high > 1e300:
            return [0] * len(choices)
    for _ in range(200):  # until no number lies between
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        if _cost(choices, [c.best(middle) for c in choices]) > budget:
            low = middle
        else:
            high = middle
    return [c.best(high) for c in choices]


def _fill(choices: list[_Choices], chosen: list[int], budget: int) -> list[int]:
    """Spends what is left, each time on the best saving per parameter among the steps that fit."""
    chosen = list(chosen)
    left = budget - _cost(choices, chosen)
    while True:
        best: tuple[float, int, int, int] | None = None
        for group, (c, at) in enumerate(zip(choices, chosen, strict=True)):
            extra = c.costs[at + 1 :] - c.costs[at]
            fits = int((extra <= left).sum())
            if fits == 0:
                continue
            gains = (c.losses[at] - c.losses[at + 1 : at + 1 + fits]) / extra[:fits]
            step = int(gains.argmax())
            candidate = (float(gains[step]), -group, at + 1 + step, int(extra[step]))
            best = candidate if best is None or candidate > best else best
        if best is None:
            return chosen
        _, negative, choice, extra_cost = best
        chosen[-negative] = choice
        left -= extra_cost
