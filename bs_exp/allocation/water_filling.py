"""The ranks of least total predicted loss over all groups under one parameter budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from bs_exp.errors import ConfigError
from bs_exp.protocols import AllocationProblem, Layout
from bs_exp.rank_budget import (
    at_price,
    check_affordable,
    least_parameters,
    make_plan,
    parameter_budget,
    spectrum_choices,
    spend,
)
from bs_exp.types import RankPlan, Statistic, WeightGroup
from bs_exp.validation import check_at_least, check_retain_ratio, check_share, is_number, shown


@dataclass(frozen=True, kw_only=True)
class WaterFilling:
    """Minimises the sum of the groups' predicted losses under one parameter budget.

    For a price per parameter every group picks its own best rank, or stays dense; the price is bisected until the
    budget is met, and what is left goes to the best saving per parameter that still fits. With the plain layout that is
    components in the order of what they save per parameter, the optimum of the separable convex problem. The losses
    must have one unit, so use whitening=two_sided: losses in `||X dW||` differ in scale between matrix types, and
    spending by them is harmful.

    No group keeps less than `min_ratio` of its parameters (its rank rounded down, but one component), or more than
    `max_ratio` (a larger retain_ratio replaces it). `layer_bounds` are [least, most] for single layers and always hold:
    where all groups are at their upper bounds, the plan keeps less than the budget. A group of several layers keeps to
    the bounds of all of them.

    Ranks are multiples of `multiple` (faster on matrix units), or the fewest components that a group's bounds allow.
    """

    min_ratio: float
    max_ratio: float = 1.0
    layer_bounds: Mapping[int, tuple[float, float]] | None = None
    multiple: int = 1

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __post_init__(self) -> None:
        check_at_least(1, multiple=self.multiple)
        check_share(min_ratio=self.min_ratio)
        check_share(above=self.min_ratio, max_ratio=self.max_ratio)
        object.__setattr__(self, "layer_bounds", _as_bounds(self.layer_bounds))

    def check(self, groups: tuple[WeightGroup, ...], retain_ratio: float, layout: Layout) -> None:
        check_affordable(groups, retain_ratio, layout, lowest=self.min_ratio)
        if groups and self.multiple > (largest := max(group.full_rank for group in groups)):
            raise ConfigError(f"allocation.multiple must be at most the largest rank, {largest}, got {self.multiple}.")
        if not self.layer_bounds:
            return
        present = sorted({layer for group in groups for layer in group.blocks})
        if unknown := sorted(set(self.layer_bounds) - set(present)):
            raise ConfigError(
                f"allocation.layer_bounds names layer {unknown[0]}, but the model's layers are {present[0]} to "
                f"{present[-1]}."
            )
        total = sum(group.parameters for group in groups)
        least = sum(least_parameters(group, layout, self.bounds(group, retain_ratio)[0]) for group in groups)
        if least > parameter_budget(total, retain_ratio):
            raise ConfigError(
                f"retain_ratio {retain_ratio} is below the {least / total:.4f} that the lower bounds of "
                "allocation.layer_bounds need. Raise retain_ratio or lower these bounds."
            )

    def allocate(self, problem: AllocationProblem) -> RankPlan:
        """Ranks that spend the budget up to less than one step, as far as the upper bounds allow.

        Raises ConfigError if one component per group, or the lower bounds, already exceed the budget, or the bounds do
        not fit the layers.
        """
        check_retain_ratio(problem.retain_ratio)
        self.check(tuple(s.group for s in problem.spectra), problem.retain_ratio, problem.layout)
        budget = parameter_budget(sum(s.group.parameters for s in problem.spectra), problem.retain_ratio)
        choices = []
        for spectrum in problem.spectra:
            low, high = self.bounds(spectrum.group, problem.retain_ratio)
            every = spectrum_choices(spectrum, problem.layout, lowest=low, highest=high)
            choices.append(every.multiples(self.multiple))
        chosen = spend(choices, at_price(choices, budget), budget)
        return make_plan(problem, [c.ranks[i] for c, i in zip(choices, chosen, strict=True)])

    def bounds(self, group: WeightGroup, retain_ratio: float) -> tuple[float, float]:
        """The least and the largest share of its parameters that a group may keep; ConfigError if bounds contradict."""
        everywhere = (self.min_ratio, max(self.max_ratio, retain_ratio))
        by_layer = [(self.layer_bounds or {}).get(layer, everywhere) for layer in group.blocks]
        low, high = max(low for low, _ in by_layer), min(high for _, high in by_layer)
        if low > high:
            raise ConfigError(
                f"allocation.layer_bounds: {group.name} has one share for all its layers, but one of them must keep at "
                f"least {low} and another at most {high}. Let the bounds overlap, or use sharing=none."
            )
        return low, high


def _as_bounds(given: Mapping[int, tuple[float, float]] | None) -> dict[int, tuple[float, float]] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ConfigError(f"layer_bounds must name layers, as in {{0:[0.9,1.0]}}, or be null, got {shown(given)}.")
    for layer, pair in given.items():
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ConfigError(f"layer_bounds must name layers by their numbers, from 0, got {shown(layer)}.")
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2 and all(map(is_number, pair))
        if not (is_pair and 0.0 <= pair[0] <= pair[1] <= 1.0):
            raise ConfigError(
                "layer_bounds must give [least, most] with 0 <= least <= most <= 1, got "
                f"{list(pair) if isinstance(pair, tuple) else pair} for layer {layer}."
            )
    return {layer: (float(low), float(high)) for layer, (low, high) in given.items()}
