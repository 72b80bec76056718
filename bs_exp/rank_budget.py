"""The choices of a group (a rank, or to stay dense), their parameters and losses, and the best ones within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.protocols import Layout
from bs_exp.types import Spectrum, WeightGroup


def parameter_budget(group_parameters: int, ratio: float) -> int:
    """`ratio * group_parameters` rounded down, with the ratio taken as a decimal: 0.57 of 100 is 57, and not 56."""
    return int(Fraction(repr(ratio)) * group_parameters)


def largest_rank(group: WeightGroup, parameters: int, layout: Layout) -> int:
    """The largest rank with at most so many parameters; 0 if not even one component fits.

    For the plain layout `floor(ratio * n * d_in * d_out / (d_in + n * d_out))` (Basis Sharing, section 3.3).
    """
    low, high = 0, group.full_rank
    while low < high:  # the cost of every layout grows with the rank
        middle = (low + high + 1) // 2
        low, high = (middle, high) if layout.parameters(group, middle) <= parameters else (low, middle - 1)
    return low


def rank_at(group: WeightGroup, ratio: float, layout: Layout) -> int | None:
    """The largest rank within a share of the group's own parameters, 0 if none fits; None (dense) at a ratio of 1."""
    return None if ratio == 1.0 else largest_rank(group, parameter_budget(group.parameters, ratio), layout)


@dataclass(frozen=True, eq=False)
class Choices:
    """The choices of one group: ranks (None is dense) by rising cost in parameters, and a loss for each, in fp64."""

    ranks: tuple[int | None, ...]
    costs: Float[Tensor, " choices"]
    losses: Float[Tensor, " choices"]

    def best(self, price: float) -> int:
        """Index of the choice with the least `loss + price * parameters`, the cheapest if several are equal."""
        return int((self.losses + price * self.costs).argmin())

    def multiples(self, of: int) -> Choices:
        """The choices whose rank is a multiple of `of`, and in any case the cheapest one and dense."""
        kept = [i for i, rank in enumerate(self.ranks) if i == 0 or rank is None or rank % of == 0]
        return Choices(tuple(self.ranks[i] for i in kept), self.costs[kept], self.losses[kept])


def spectrum_choices(spectrum: Spectrum, layout: Layout, *, lowest: float = 0.0, highest: float = 1.0) -> Choices:
    """The ranks that keep shares from `lowest` to `highest` of a group's parameters, with the energies that they drop.

    These losses are in nats, or squared where the spectrum's unit is a norm. A rank that costs as much as the dense
    group is left out: dense costs no more and loses nothing. Dense is a choice if `highest` is 1.
    """
    group = spectrum.group
    first = max(1, largest_rank(group, parameter_budget(group.parameters, lowest), layout))
    costs = [layout.parameters(group, rank) for rank in range(first, group.full_rank)]
    # The first rank is always a choice: a group keeps one component, whatever the bounds.
    limit = max(parameter_budget(group.parameters, highest), costs[0] if costs else 0)
    ranks = [rank for rank, cost in enumerate(costs, start=first) if cost < group.parameters and cost <= limit]
    # tail[k] = energies[k:].sum(), added from the small end
    tail = spectrum.energies.double().cpu().flip(0).cumsum(0).flip(0)
    dense = [group.parameters] if highest == 1.0 or not ranks else []
    return Choices(
        ranks=(*ranks, *(None for _ in dense)),
        costs=torch.tensor([*costs[: len(ranks)], *dense], dtype=torch.float64),
        losses=torch.tensor([*(float(tail[rank]) for rank in ranks), *(0.0 for _ in dense)], dtype=torch.float64),
    )


def cost_of(choices: Sequence[Choices], chosen: Sequence[int]) -> int:
    """Parameters in all of one choice (index) per group."""
    return sum(int(c.costs[i]) for c, i in zip(choices, chosen, strict=True))


def spend(choices: Sequence[Choices], chosen: Sequence[int], budget: int) -> list[int]:
    """The choices (indices) after the rest of the budget is spent, always on the step that saves most per parameter.

    A step takes one group to any larger choice that still fits. What is left in the end is less than the cheapest step.
    """
    chosen = list(chosen)
    left = budget - cost_of(choices, chosen)
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


def at_price(choices: Sequence[Choices], budget: int) -> list[int]:
    """Every group's best choice (index) at the lowest price per parameter at which all fit into the budget.

    If no price suffices, every group has its cheapest choice.
    """
    cheap = [c.best(0.0) for c in choices]
    if cost_of(choices, cheap) <= budget:
        return cheap
    low, high = 0.0, 1.0
    while cost_of(choices, [c.best(high) for c in choices]) > budget:
        low, high = high, 2.0 * high
        if high > 1e300:
            return [0] * len(choices)
    for _ in range(200):  # until no float lies between the two
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        if cost_of(choices, [c.best(middle) for c in choices]) > budget:
            low = middle
        else:
            high = middle
    return [c.best(high) for c in choices]
