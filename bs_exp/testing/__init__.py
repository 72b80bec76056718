"""Contract suites for strategies, to run on one's own: subclass the suite of a family and give it the strategy.

    from bs_exp.testing import WhiteningContract

    class TestMyWhitening(WhiteningContract):
        @pytest.fixture(scope="class")
        @classmethod
        def whitening(cls):
            return MyWhitening(alpha=0.5)

The options of this package pass through the same suites (tests/contracts). Needs pytest and hypothesis.
"""

from __future__ import annotations

from importlib.util import find_spec

for _needed in ("pytest", "hypothesis"):
    if find_spec(_needed) is None:
        raise ImportError(
            f"bs_exp.testing holds test suites, and needs {_needed}, which is not installed: pip install pytest "
            "hypothesis."
        )

import pytest

_SUITES = (
    *("allocation", "importance", "layout", "precision", "schedule", "selection", "sharing", "update", "whitening"),
)
# Before they are imported: then a failed assertion shows its values.
pytest.register_assert_rewrite(*(f"{__name__}.{suite}" for suite in _SUITES))

from bs_exp.testing.allocation import AllocationContract, SpendingContract
from bs_exp.testing.importance import ImportanceContract
from bs_exp.testing.layout import LayoutContract
from bs_exp.testing.precision import PrecisionContract
from bs_exp.testing.schedule import ScheduleContract
from bs_exp.testing.selection import SelectionContract
from bs_exp.testing.sharing import SharingContract
from bs_exp.testing.update import UpdateContract
from bs_exp.testing.whitening import WhiteningContract

__all__ = [
    "AllocationContract",
    "ImportanceContract",
    "LayoutContract",
    "PrecisionContract",
    "ScheduleContract",
    "SelectionContract",
    "SharingContract",
    "SpendingContract",
    "UpdateContract",
    "WhiteningContract",
]
