"""What every schedule keeps: rounds that fall to the budget and end on it, whatever the losses say."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bs_exp.protocols import Schedule

LOSSES: dict[str, Callable[[float], float]] = {
    "nothing": lambda ratio: 0.0,
    "square": lambda ratio: (1.0 - ratio) ** 2,
    "steep": lambda ratio: 1e9 * (1.0 - ratio),
    "step": lambda ratio: float(ratio < 0.6),
}


class ScheduleContract:
    """Subclass it as `TestMine`, with a fixture `schedule` that returns the strategy."""

    @pytest.fixture(scope="class")
    @classmethod
    def schedule(cls) -> Schedule:
        """The strategy."""
        raise NotImplementedError("override the fixture `schedule`: it returns the strategy.")

    @pytest.mark.parametrize("losses", LOSSES)
    @pytest.mark.parametrize("target", [0.95, 0.8, 0.5, 0.33, 0.1])
    def test_rounds_fall_to_the_target(self, schedule: Schedule, losses: str, target: float) -> None:
        """`rounds` checks every step: strictly down, never below the target, and an end."""
        found = rounds(schedule, target, LOSSES[losses])
        assert found[-1] == target
        assert found == rounds(schedule, target, LOSSES[losses])

    def test_where_everything_is_kept_the_first_round_is_the_last(self, schedule: Schedule) -> None:
        assert schedule.next_ratio(1.0, 1.0, LOSSES["square"]) == 1.0

    def test_losses_are_asked_for_where_there_may_be_a_round(self, schedule: Schedule) -> None:
        asked: list[float] = []

        def loss_at(ratio: float) -> float:
            asked.append(ratio)
            return (1.0 - ratio) ** 2

        schedule.next_ratio(0.9, 0.4, loss_at)
        assert all(0.4 <= ratio <= 0.9 for ratio in asked)


def rounds(schedule: Schedule, target: float, loss_at: Callable[[float], float]) -> list[float]:
    """The shares after each round, from dense to the target."""
    ratios = [1.0]
    while ratios[-1] > target:
        ratios.append(schedule.next_ratio(ratios[-1], target, loss_at))
        assert target <= ratios[-1] < ratios[-2]
        assert len(ratios) < 100
    return ratios[1:]
