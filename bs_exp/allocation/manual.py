"""Ranks from shares that the user sets by layer, depth and matrix type, scaled to the budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bs_exp.errors import ConfigError
from bs_exp.protocols import AllocationProblem, Layout
from bs_exp.rank_budget import check_affordable, make_plan, mean_over_layers, share_out
from bs_exp.types import MATRIX_TYPES, RankPlan, Statistic, WeightGroup
from bs_exp.validation import check_share, shown


@dataclass(frozen=True, kw_only=True)
class ManualAllocation:
    """Every group keeps parameters in proportion to `by_layer * by_depth * by_type`, scaled to the budget.

    `by_layer` gives a number to each block. `by_depth` is a curve over the blocks, first to last: its points are evenly
    spaced, and linear in between, so that few numbers (a search's parameters) shape a model of any depth. `by_type`
    gives a number to each matrix type; types that a model lacks are ignored. A factor that is null, or not named, is 1;
    only proportions matter. A group of several layers takes the mean of its layers' numbers.
    No group keeps less than `min_ratio` of its parameters, or more than `max_ratio` (a larger retain_ratio replaces
    it); what a bound cuts off goes to the others.
    """

    by_layer: tuple[float, ...] | None
    by_depth: tuple[float, ...] | None
    by_type: Mapping[str, float] | None
    min_ratio: float
    max_ratio: float

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __post_init__(self) -> None:
        for name in ("by_layer", "by_depth"):
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else tuple(given))
        object.__setattr__(self, "by_type", None if self.by_type is None else dict(self.by_type))
        _check_shares("by_layer", None if self.by_layer is None else dict(enumerate(self.by_layer)))
        _check_shares("by_depth", None if self.by_depth is None else dict(enumerate(self.by_depth)))
        if unknown := sorted(set(self.by_type or {}) - set(MATRIX_TYPES)):
            raise ConfigError(
                f"by_type names {', '.join(unknown)}, which is no matrix type. Matrix types: {', '.join(MATRIX_TYPES)}."
            )
        _check_shares("by_type", self.by_type)
        check_share(min_ratio=self.min_ratio)
        check_share(above=self.min_ratio, max_ratio=self.max_ratio)

    def check(self, groups: tuple[WeightGroup, ...], retain_ratio: float, layout: Layout) -> None:
        check_affordable(groups, retain_ratio, layout, lowest=self.min_ratio)
        self._wanted(groups)

    def allocate(self, problem: AllocationProblem) -> RankPlan:
        """Ranks that spend the budget up to less than one component, as far as max_ratio allows.

        Raises ConfigError if one component per group, or min_ratio, exceeds the budget, if by_layer has not one number
        per block, or if the numbers multiply to 0 for every group.
        """
        groups = tuple(s.group for s in problem.spectra)
        self.check(groups, problem.retain_ratio, problem.layout)
        wanted = self._wanted(groups)
        return make_plan(problem, share_out(problem, wanted, lowest=self.min_ratio, highest=self.max_ratio))

    def _wanted(self, groups: tuple[WeightGroup, ...]) -> list[float]:
        by_layer, by_type = self._by_layer(groups), self.by_type or {}
        wanted = [by_type.get(group.matrix, 1.0) * mean_over_layers(group, by_layer) for group in groups]
        if not any(wanted):
            raise ConfigError(
                "allocation=manual wants nothing anywhere: by_layer * by_depth * by_type is 0 for every group of this "
                f"model (matrix types {', '.join(dict.fromkeys(g.matrix for g in groups))}). Give some of them more."
            )
        return wanted

    def _by_layer(self, groups: Iterable[WeightGroup]) -> dict[int, float]:
        """The wanted share of each block by its number, from `by_layer` and `by_depth`."""
        layers = 1 + max(layer for group in groups for layer in group.blocks)
        if self.by_layer is not None and len(self.by_layer) != layers:
            raise ConfigError(
                f"allocation.by_layer must hold one number for each of the model's {layers} blocks, got "
                f"{len(self.by_layer)}. For a curve through fewer points use allocation.by_depth."
            )
        depth = np.linspace(0.0, 1.0, layers)
        curve = self.by_depth or (1.0,)
        shares = np.interp(depth, np.linspace(0.0, 1.0, len(curve)), curve) * np.asarray(self.by_layer or 1.0)
        return dict(enumerate(shares.tolist()))


def _check_shares(setting: str, shares: Mapping[Any, float] | None) -> None:
    if shares is None:
        return
    if not shares:
        raise ConfigError(f"{setting} is empty: give numbers, or null.")
    for key, value in shares.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < math.inf:
            raise ConfigError(f"{setting} must hold finite numbers of at least 0, got {shown(value)} for {key}.")
    if not any(shares.values()):
        raise ConfigError(f"{setting} must hold a number above 0, got zeros alone.")
