"""What every schedule keeps: rounds that fall to the budget and end on it, whatever the losses say."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.options import option_of, options, strategy
from tests.support.schedules import rounds

ROWS = [
    "schedule=single",
    "schedule=steps",
    "schedule=steps schedule.size=0.3",
    "schedule=steps schedule.size=1.0",
    "schedule=adaptive_steps",
    "schedule=adaptive_steps schedule.max_loss=1e-9 schedule.min_size=0.1 schedule.max_size=0.1",
]
LOSSES: dict[str, Callable[[float], float]] = {
    "nothing": lambda ratio: 0.0,
    "square": lambda ratio: (1.0 - ratio) ** 2,
    "steep": lambda ratio: 1e9 * (1.0 - ratio),
    "step": lambda ratio: float(ratio < 0.6),
}
EVERY = pytest.mark.parametrize("row", ROWS)


def test_every_option_has_a_row() -> None:
    assert {option_of(row) for row in ROWS} == options("schedule")


@EVERY
@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("target", [0.95, 0.8, 0.5, 0.33, 0.1])
def test_rounds_fall_to_the_target(row: str, losses: str, target: float) -> None:
    """`rounds` checks every step: strictly down, never below the target, and an end."""
    found = rounds(strategy(row), target, LOSSES[losses])
    assert found[-1] == target
    assert found == rounds(strategy(row), target, LOSSES[losses])


@EVERY
def test_where_everything_is_kept_the_first_round_is_the_last(row: str) -> None:
    assert strategy(row).next_ratio(1.0, 1.0, LOSSES["square"]) == 1.0


@EVERY
def test_losses_are_asked_for_where_there_may_be_a_round(row: str) -> None:
    asked: list[float] = []

    def loss_at(ratio: float) -> float:
        asked.append(ratio)
        return (1.0 - ratio) ** 2

    strategy(row).next_ratio(0.9, 0.4, loss_at)
    assert all(0.4 <= ratio <= 0.9 for ratio in asked)
