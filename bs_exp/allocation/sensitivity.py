"""Ranks by measured sensitivity: each group is truncated alone, and the least harmful truncations are taken."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import numpy as np
import torch

from bs_exp.errors import ConfigError
from bs_exp.protocols import AllocationProblem, Layout, PlanObjective, Score
from bs_exp.rank_budget import Choices, check_affordable, cost_of, make_plan, parameter_budget, spectrum_choices, spend
from bs_exp.types import RankPlan, Statistic, WeightGroup
from bs_exp.validation import check_choice

_UNITS = ("matrix", "block")


@dataclass(frozen=True)
class _Truncation:
    """Groups (indices) at these choices (indices), all others dense, and the objective's value, lower is better."""

    value: float
    groups: tuple[int, ...]
    choices: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SensitivitySearch:
    """Every group is truncated to every one of `ratios` while all others are dense, and the model is measured.

    Truncations are sorted by the measured value, and as few of the least harmful ones are taken as meet the budget;
    their number is found by bisection. If several are taken for one group, its smallest rank counts; a group of which
    none is taken stays dense. What is left of the budget goes, component by component, where the measured curves
    predict the largest gain. `unit=block` truncates all groups of a block together (blocks that share a basis count as
    one): far fewer measurements, one per block and ratio. ASVD (2312.05821), section on sensitivity; its official code
    measures perplexity at ratios 0.4 to 0.9, and applies the last number that its bisection tried rather than the one
    it found.
    """

    ratios: tuple[float, ...]
    unit: str
    objective: str
    num_windows: int | None

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(self.ratios))
        if not self.ratios or not all(0.0 < ratio < 1.0 for ratio in self.ratios):
            raise ConfigError(f"ratios must be shares above 0 and below 1, at least one, got {list(self.ratios)}.")
        check_choice("unit", self.unit, _UNITS)
        PlanObjective(objective=self.objective, num_windows=self.num_windows)

    @property
    def measured_by(self) -> PlanObjective:
        return PlanObjective(objective=self.objective, num_windows=self.num_windows)

    def check(self, groups: tuple[WeightGroup, ...], retain_ratio: float, layout: Layout) -> None:
        check_affordable(groups, retain_ratio, layout)
        smallest = min(self.ratios)
        if retain_ratio < smallest:
            raise ConfigError(
                f"retain_ratio {retain_ratio} is below {smallest}, the smallest of allocation.ratios, so no plan made "
                "of them meets it. Raise retain_ratio or add a smaller ratio."
            )

    def check_search(self, identity: Mapping[str, Any]) -> None:
        """Raises nothing: this search keeps no state of its own beside the cached scores."""

    def allocate(self, problem: AllocationProblem) -> RankPlan:
        """Ranks that spend the budget up to less than one component.

        Raises ConfigError if one component per group, or the smallest ratio, exceeds the budget.
        """
        self.check(tuple(s.group for s in problem.spectra), problem.retain_ratio, problem.layout)
        choices = [spectrum_choices(spectrum, problem.layout) for spectrum in problem.spectra]
        dense = [len(c.ranks) - 1 for c in choices]
        if problem.retain_ratio == 1.0:
            return make_plan(problem, [None] * len(choices))
        if problem.score is None:
            raise ValueError("SensitivitySearch measures plans, so its problem needs a score.")
        base = problem.score(_plan(problem, choices, dense))
        measured = sorted(
            self._measure(problem, choices, dense, problem.score), key=lambda t: (t.value, t.groups, t.choices)
        )
        budget = parameter_budget(sum(s.group.parameters for s in problem.spectra), problem.retain_ratio)

        def after(taken: int) -> list[int]:
            chosen = list(dense)
            for truncation in measured[:taken]:
                for group, choice in zip(truncation.groups, truncation.choices, strict=True):
                    chosen[group] = min(chosen[group], choice)
            return chosen

        taken = bisect_left(range(len(measured)), True, key=lambda n: cost_of(choices, after(n)) <= budget)
        chosen = spend(_curves(choices, measured, base), after(taken), budget)
        report = {
            "strategy": "sensitivity",
            "objective": self.objective,
            "dense_value": base,
            "cut_value": measured[taken - 1].value if taken else None,
            "measured": [
                [problem.spectra[t.groups[0]].group.name, len(t.groups), _kept(problem, choices, t), t.value]
                for t in measured
            ],
        }
        return replace(_plan(problem, choices, chosen), search=report)

    def _measure(
        self, problem: AllocationProblem, choices: Sequence[Choices], dense: Sequence[int], score: Score
    ) -> list[_Truncation]:
        groups = [spectrum.group for spectrum in problem.spectra]
        units = _blocks(groups) if self.unit == "block" else [(index,) for index in range(len(groups))]
        wanted = {
            (unit, tuple(_at_share(choices[i], groups[i], ratio) for i in unit))
            for unit, ratio in product(units, self.ratios)
        }
        found = []
        for unit, at in score.track(sorted(wanted), label="measuring sensitivity", total=len(wanted)):
            chosen = list(dense)
            for index, choice in zip(unit, at, strict=True):
                chosen[index] = choice
            found.append(_Truncation(score(_plan(problem, choices, chosen)), unit, at))
        return found


def _plan(problem: AllocationProblem, choices: Sequence[Choices], chosen: Sequence[int]) -> RankPlan:
    return make_plan(problem, [c.ranks[i] for c, i in zip(choices, chosen, strict=True)])


def _at_share(choices: Choices, group: WeightGroup, ratio: float) -> int:
    """Index of the largest choice within a share of the group's parameters; one component if none is."""
    return max(0, int((choices.costs <= parameter_budget(group.parameters, ratio)).sum()) - 1)


def _kept(problem: AllocationProblem, choices: Sequence[Choices], truncation: _Truncation) -> float:
    """The share of its groups' parameters that a truncation keeps."""
    costs = [float(choices[i].costs[at]) for i, at in zip(truncation.groups, truncation.choices, strict=True)]
    return sum(costs) / sum(problem.spectra[i].group.parameters for i in truncation.groups)


def _curves(choices: Sequence[Choices], measured: Sequence[_Truncation], base: float) -> list[Choices]:
    """Each group's choices with the measured values as losses, interpolated linearly in the number of parameters."""
    worst = max((t.value for t in measured if math.isfinite(t.value)), default=1.0)
    points: list[dict[float, float]] = [{float(c.costs[-1]): base} for c in choices]
    for truncation in measured:
        # Outputs that are not finite count as worse than any measured value, so that any larger rank is a gain.
        value = truncation.value if math.isfinite(truncation.value) else 2.0 * abs(worst)
        for index, choice in zip(truncation.groups, truncation.choices, strict=True):
            points[index].setdefault(float(choices[index].costs[choice]), value)
    curves = []
    for c, known in zip(choices, points, strict=True):
        costs = sorted(known)
        losses = np.interp(c.costs.numpy(), costs, [known[cost] for cost in costs])
        curves.append(Choices(c.ranks, c.costs, torch.from_numpy(losses)))
    return curves


def _blocks(groups: Sequence[WeightGroup]) -> list[tuple[int, ...]]:
    """The indices of the groups of each block; blocks that share a basis are one unit."""
    units: list[tuple[set[int], tuple[int, ...]]] = []
    for index, group in enumerate(groups):
        layers = set(group.blocks)
        members: tuple[int, ...] = (index,)
        for unit in [unit for unit in units if unit[0] & layers]:
            units.remove(unit)
            layers, members = layers | unit[0], unit[1] + members
        units.append((layers, members))
    return [tuple(sorted(members)) for _, members in units]
