"""What every sharing keeps: each matrix in one group of its kind, no look at what was not asked for, and its word."""

from __future__ import annotations

from typing import Any

import pytest

from bs_exp.protocols import Sharing
from bs_exp.sharing.none import NoSharing
from bs_exp.testing import SharingContract
from tests.support.options import option_of, options, strategy

ROWS = [
    "sharing=none",
    "sharing=all",
    "sharing=attention",
    "sharing=mlp",
    "sharing=paper sharing.group_size=1",
    "sharing=paper sharing.group_size=3",
    "sharing=paper sharing.group_size={q:2,up:5}",
    "sharing=explicit sharing.layers={q:[[0,3],[4,2]],down:[[1]]}",
    "sharing=clustered",
    "sharing=clustered sharing.space=weight sharing.min_size=2 sharing.max_size=3",
    "sharing=clustered sharing.clusters=2 sharing.max_size=null sharing.linkage=single",
    "sharing=criterion",
    "sharing=criterion sharing.norm=frobenius sharing.squared=true",
    "sharing=criterion sharing.norm=output sharing.max_size=2",
    "sharing=optimal sharing.g_max=3",
    "sharing=heads",
    "sharing=heads sharing.heads_per_block=1 sharing.group_size=3",
    "sharing=residual sharing.residual_rank=2",
]


class TestSharings(SharingContract):
    @pytest.fixture(scope="class", params=ROWS)
    @classmethod
    def sharing(cls, request: pytest.FixtureRequest) -> Any:
        return strategy(request.param)

    def takes_any_model(self, sharing: Sharing) -> bool:
        return isinstance(sharing, NoSharing)


def test_every_option_has_a_row() -> None:
    assert {option_of(row) for row in ROWS} == options("sharing")
