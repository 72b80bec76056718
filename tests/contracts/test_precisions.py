"""What every precision keeps, in every layout: matrices alone change, and what is saved is what runs."""

from __future__ import annotations

from typing import Any

import pytest

from bs_exp.precision.none import ModelPrecision
from bs_exp.protocols import Precision
from bs_exp.testing import PrecisionContract
from tests.support.options import option_of, options, strategy

# Groups of 5 columns end in a smaller one; 3 and 4 bits fill no byte in matrices of odd sizes.
ROWS = [
    "precision=none",
    "precision=int8 precision.inputs=one_shot precision.order=natural",
    "precision=int4 precision.group_size=5",
    "precision=int3 precision.group_size=5 precision.symmetric=true precision.refit=false"
    " precision.error_feedback=false",
]


class TestPrecisions(PrecisionContract):
    @pytest.fixture(scope="class", params=ROWS, ids=[row[10:40] for row in ROWS])
    @classmethod
    def precision(cls, request: pytest.FixtureRequest) -> Any:
        return strategy(request.param)

    def quantises(self, precision: Precision) -> bool:
        return not isinstance(precision, ModelPrecision)


def test_every_option_has_a_row() -> None:
    assert {option_of(row) for row in ROWS} == options("precision")
