"""What every layout keeps: the product, what it costs to the last number, and costs that grow with the rank."""

from __future__ import annotations

from typing import Any

import pytest

from bs_exp.testing import LayoutContract
from tests.support.options import option_of, options, strategy

ROWS = ["layout=plain", "layout=pivoted"]


class TestLayouts(LayoutContract):
    @pytest.fixture(scope="class", params=ROWS)
    @classmethod
    def layout(cls, request: pytest.FixtureRequest) -> Any:
        return strategy(request.param)


def test_every_option_has_a_row_and_bears_its_name() -> None:
    assert {option_of(row) for row in ROWS} == options("layout")
    assert all(strategy(row).name == option_of(row) for row in ROWS)
