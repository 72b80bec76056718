"""What a schedule does from dense to its target."""

from __future__ import annotations

from collections.abc import Callable

from bs_exp.protocols import Schedule


def rounds(schedule: Schedule, target: float, loss_at: Callable[[float], float]) -> list[float]:
    ratios = [1.0]
    while ratios[-1] > target:
        ratios.append(schedule.next_ratio(ratios[-1], target, loss_at))
        assert target <= ratios[-1] < ratios[-2]
        assert len(ratios) < 100
    return ratios[1:]
