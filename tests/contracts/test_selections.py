"""What every selection keeps: candidates that are recipes, a fair contest on windows unseen, and plain data on it."""

from __future__ import annotations

from typing import Any

import pytest

from bs_exp.testing import SelectionContract
from tests.support.options import option_of, options, strategy

ROWS = [
    "selection=none",
    "selection=measured ~selection.candidates.optimal ~selection.candidates.pairs_tempered",
    "selection=measured selection.holdout=0.9 selection.recalibrate=false selection.seed=3"
    " ~selection.candidates.optimal ~selection.candidates.pairs_tempered ~selection.candidates.private_tempered",
]


class TestSelections(SelectionContract):
    @pytest.fixture(scope="class", params=ROWS, ids=[row[:40] for row in ROWS])
    @classmethod
    def selection(cls, request: pytest.FixtureRequest) -> Any:
        return strategy(request.param)


def test_every_option_has_a_row() -> None:
    assert {option_of(row) for row in ROWS} == options("selection")
