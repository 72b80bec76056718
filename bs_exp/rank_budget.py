"""Ranks under an exact budget of parameters: the mathematics of all allocators.

The choices of a group (a rank, or to stay dense) with their parameters and losses, the best ones within a budget, and
wanted shares turned into ranks.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.errors import ConfigError
from bs_exp.protocols import AllocationProblem, Layout
from bs_exp.types import PlannedGroup, RankPlan, Spectrum, WeightGroup, block_of
from bs_exp.validation import check_retain_ratio

Item = TypeVar("Item")


def parameter_budget(group_parameters: int, ratio: float) -> int:
    """`ratio * group_parameters` rounded down, with the ratio taken as a decimal: 0.57 of 100 is 57, and not 56."""
    return int(Fraction(repr(ratio)) * group_parameters)


def largest_rank(group: WeightGroup, parameters: int, layout: Layout) -> int:
    """The largest rank with at most so many parameters; 0 if not even one component fits.

    For the plain layout `floor(ratio * n * d_in * d_out / (d_in + n * d_out))` (Basis Sharing, section 3.3).
    """
    # The parameters of every layout grow with the rank.
    return bisect_right(range(1, group.full_rank + 1), parameters, key=lambda rank: layout.parameters(group, rank))


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
    price = lowest_price(lambda price: cost_of(choices, [c.best(price) for c in choices]), budget)
    return [0] * len(choices) if math.isinf(price) else [c.best(price) for c in choices]


def lowest_price(cost: Callable[[float], int], budget: int) -> float:
    """The lowest price per parameter at which the cost is within the budget; infinity if none is.

    `cost` gives whole parameters, and falls with the price.
    """
    if cost(0.0) <= budget:
        return 0.0
    low, high = 0.0, 1.0
    while cost(high) > budget:
        low, high = high, 2.0 * high
        if high > 1e300:
            return math.inf
    return turning_point(low, high, lambda price: cost(price) > budget)[1]


def turning_point(low: float, high: float, is_low: Callable[[float], bool]) -> tuple[float, float]:
    """The two neighbouring floats between which `is_low` turns from true (at `low`) to false (at `high`)."""
    for _ in range(1100):  # more halvings than floats have bits and exponents
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (middle, high) if is_low(middle) else (low, middle)
    return low, high


def least_parameters(group: WeightGroup, layout: Layout, lowest: float = 0.0) -> int:
    """The fewest parameters of a group: those of its largest rank within the share `lowest`, but one component."""
    rank = max(1, largest_rank(group, parameter_budget(group.parameters, lowest), layout))
    return group.parameters if rank >= group.full_rank else min(layout.parameters(group, rank), group.parameters)


def whole(group: WeightGroup) -> str:
    """One pool for all groups."""
    return "all groups"


def by_type(group: WeightGroup) -> str:
    """One pool per matrix type."""
    return f"type {group.matrix}"


Pool = Callable[[WeightGroup], str]


def check_affordable(
    groups: Iterable[WeightGroup], ratio: float, layout: Layout, *, lowest: float = 0.0, pool: Pool = whole
) -> None:
    """Raises ConfigError unless the `least_parameters` of the groups fit into the budget of every pool."""
    check_retain_ratio(ratio)
    for name, members in _pools(groups, pool).items():
        total = sum(group.parameters for group in members)
        least = sum(least_parameters(group, layout, lowest) for group in members)
        if least > parameter_budget(total, ratio):
            bound = f" with allocation.min_ratio={lowest}" if lowest else ""
            of = "" if pool is whole else f" ({name})"
            raise ConfigError(
                f"retain_ratio {ratio} is below the {least / total:.4f} that one component per group{of}{bound} needs. "
                f"Raise retain_ratio{' or lower allocation.min_ratio' if lowest else ''}."
            )


def spread(
    wanted: Float[Tensor, " n"],
    sizes: Float[Tensor, " n"],
    low: Float[Tensor, " n"],
    high: Float[Tensor, " n"],
    total: float,
) -> Float[Tensor, " n"]:
    """`clip(c * wanted, low, high)` with the largest c at which `sum(sizes * .)` is within the total.

    So what one entry cannot take, or must have, is spread over the others in proportion to what they want. An entry
    that wants 0 gets only what the others cannot hold. The total must lie between the sums of `sizes` times the bounds.
    The result is in fp64.
    """
    most = float(wanted.max())
    wanted = (wanted.double() / most).clamp_min(1e-12) if most > 0.0 else torch.ones_like(wanted, dtype=torch.float64)

    def at(factor: float) -> Tensor:
        return torch.minimum(torch.maximum(factor * wanted, low), high)

    above = float((high / wanted).max())
    if float((sizes * at(above)).sum()) <= total:
        return at(above)
    return at(turning_point(0.0, above, lambda factor: float((sizes * at(factor)).sum()) <= total)[0])


def share_out(
    problem: AllocationProblem,
    wanted: Sequence[float],
    *,
    removing: bool = False,
    lowest: float = 0.0,
    highest: float = 1.0,
    pool: Pool = whole,
) -> list[int | None]:
    """Ranks (None is dense) that keep, or remove, parameters in proportion to `wanted`, and spend the budget.

    `wanted` are shares of the groups' own parameters, of which only the proportions within a pool count; every pool has
    the same budget per parameter. Shares are clipped between `lowest` (at least one component) and `highest` (1 is
    dense; a group whose factors would cost as much is dense too), and the excess is spread over the others. Ranks are
    rounded down; the remainder of all pools is then spent by `nearest_ranks`. Raises ConfigError if the bounds do not
    fit the budget.
    """
    if problem.retain_ratio == 1.0:
        return [None] * len(problem.spectra)
    groups = [spectrum.group for spectrum in problem.spectra]
    check_affordable(groups, problem.retain_ratio, problem.layout, lowest=lowest, pool=pool)
    highest = max(highest, problem.retain_ratio)
    choices = [spectrum_choices(s, problem.layout, lowest=lowest, highest=highest) for s in problem.spectra]
    targets = torch.zeros(len(groups), dtype=torch.float64)
    for members in _pools(range(len(groups)), lambda index: pool(groups[index])).values():
        sizes = torch.tensor([groups[i].parameters for i in members], dtype=torch.float64)
        low = torch.stack([choices[i].costs[0] for i in members]) / sizes
        high = torch.maximum(low, torch.full_like(low, highest))
        budget = parameter_budget(sum(groups[i].parameters for i in members), problem.retain_ratio)
        wants = torch.tensor([wanted[i] for i in members], dtype=torch.float64)
        if removing:
            shares = 1.0 - spread(wants, sizes, 1.0 - high, 1.0 - low, float(sizes.sum()) - budget)
        else:
            shares = spread(wants, sizes, low, high, budget)
        targets[members] = sizes * shares
    return nearest_ranks(problem, choices, targets.tolist())


def nearest_ranks(problem: AllocationProblem, choices: Sequence[Choices], targets: Sequence[float]) -> list[int | None]:
    """The largest rank (None is dense) within each group's target, in parameters, with the rest of the budget spent.

    The rest goes, component by component, where it lowers the squared distance to the target most per parameter: the
    largest shortfall is filled first. Raises ValueError if the targets exceed the budget.
    """
    budget = parameter_budget(sum(s.group.parameters for s in problem.spectra), problem.retain_ratio)
    # Targets are sums and products of floats; a rank that they meet up to rounding is met.
    chosen = [max(0, int((c.costs <= target + 1e-4).sum()) - 1) for c, target in zip(choices, targets, strict=True)]
    distances = [
        Choices(c.ranks, c.costs, (c.costs - target).square()) for c, target in zip(choices, targets, strict=True)
    ]
    if (spent := cost_of(choices, chosen)) > budget:
        raise ValueError(f"targets cost {spent} parameters, which is more than the budget of {budget}")
    return [c.ranks[i] for c, i in zip(choices, spend(distances, chosen, budget), strict=True)]


def mean_over_layers(group: WeightGroup, by_layer: Mapping[int, float]) -> float:
    """The mean of a number by layer over the layers of a group's matrices."""
    return sum(by_layer[block_of(place)] for place in group.layers) / group.size


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


def planned_shapes(
    groups: Sequence[WeightGroup], ranks: Sequence[int | None], ratio: float, layout: Layout
) -> RankPlan:
    """A plan of which no losses are known: what is stored at these ranks."""
    sizes = [
        group.parameters if rank is None else layout.parameters(group, max(1, rank))
        for group, rank in zip(groups, ranks, strict=True)
    ]
    planned = (PlannedGroup(g, rank, size, 0.0, 0.0) for g, rank, size in zip(groups, ranks, sizes, strict=True))
    return RankPlan(groups=tuple(planned), requested_ratio=ratio, layout=layout.name)


def _pools(items: Iterable[Item], pool: Callable[[Item], str]) -> Mapping[str, list[Item]]:
    members: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        members[pool(item)].append(item)
    return members
