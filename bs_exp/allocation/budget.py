"""Parameters of ranks, and how wanted shares become ranks under an exact budget: shared by the allocators."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.errors import ConfigError
from bs_exp.protocols import AllocationProblem, Layout
from bs_exp.rank_budget import Choices, cost_of, largest_rank, parameter_budget, spectrum_choices, spend
from bs_exp.types import PlannedGroup, RankPlan, Spectrum, WeightGroup

Item = TypeVar("Item")


def check_retain_ratio(ratio: float) -> None:
    """Raises ConfigError unless the ratio lies in (0, 1]."""
    if not 0.0 < ratio <= 1.0:
        raise ConfigError(
            f"retain_ratio must be above 0 and at most 1 (the share of the targeted parameters to keep), got {ratio}. "
            "A compression ratio of 20 % is retain_ratio=0.8."
        )


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

    below, above = 0.0, float((high / wanted).max())
    if float((sizes * at(above)).sum()) <= total:
        return at(above)
    for _ in range(1100):  # until no float lies between the two
        middle = 0.5 * (below + above)
        if not below < middle < above:
            break
        if float((sizes * at(middle)).sum()) <= total:
            below = middle
        else:
            above = middle
    return at(below)


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
    """The mean of a number by layer over the layers of a group."""
    return sum(by_layer[layer] for layer in group.layers) / group.size


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


def _pools(items: Iterable[Item], pool: Callable[[Item], str]) -> Mapping[str, list[Item]]:
    members: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        members[pool(item)].append(item)
    return members
