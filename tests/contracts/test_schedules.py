"""What every schedule keeps: rounds that fall to the budget and end on it, whatever the losses say."""

from __future__ import annotations

from typing import Any

import pytest

from bs_exp.testing import ScheduleContract
from tests.support.options import option_of, options, strategy

ROWS = [
    "schedule=single",
    "schedule=steps",
    "schedule=steps schedule.size=0.3",
    "schedule=steps schedule.size=1.0",
    "schedule=adaptive_steps",
    "schedule=adaptive_steps schedule.max_loss=1e-9 schedule.min_size=0.1 schedule.max_size=0.1",
]


class TestSchedules(ScheduleContract):
    @pytest.fixture(scope="class", params=ROWS)
    @classmethod
    def schedule(cls, request: pytest.FixtureRequest) -> Any:
        return strategy(request.param)


def test_every_option_has_a_row() -> None:
    assert {option_of(row) for row in ROWS} == options("schedule")
