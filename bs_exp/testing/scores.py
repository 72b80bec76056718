"""Scores for allocators that measure: formulas on plans, whose optimum is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bs_exp.types import PlannedGroup, RankPlan

Item = TypeVar("Item")


def kept(planned: PlannedGroup) -> float:
    """The share that a group keeps."""
    return planned.parameters / planned.group.parameters


@dataclass(eq=False)
class FormulaScore:
    """Any formula as a score, in two batches; `plans` are those that were measured, in order."""

    formula: Callable[[RankPlan], float]
    identity: Mapping[str, Any] = field(default_factory=lambda: {"model": "formula", "retain_ratio": 0.5})
    plans: list[RankPlan] = field(default_factory=list)
    batches: int = 0

    def __call__(self, plan: RankPlan) -> float:
        *_, value = self.running(plan)
        return value

    def running(self, plan: RankPlan) -> Iterator[float]:
        self.plans.append(plan)
        value = self.formula(plan)
        for share in (0.9, 1.0):
            self.batches += 1
            yield share * value

    def track(self, iterable: Iterable[Item], *, label: Any, total: int | None = None) -> Iterator[Item]:
        assert isinstance(label() if callable(label) else label, str)
        yield from iterable
