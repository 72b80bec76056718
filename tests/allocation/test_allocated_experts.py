"""Experts count for the layer that they lie in, whatever decides by layer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bs_exp.cache import Cache
from bs_exp.models.experts import unfused
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress
from bs_exp.progress import Progress
from bs_exp.rank_budget import mean_over_layers
from bs_exp.sharing.adjacent import AdjacentSharing
from bs_exp.types import ExpertPlace, RankPlan, WeightGroup
from bs_exp.workspace import Workspace
from tests.support.options import options, strategy
from tests.support.recipes import RECIPE, RandomTokens

SHARING = AdjacentSharing(matrices=("q", "expert_gate"), group_size=2)
# Searches that measure plans on text know groups by name alone.
MEASURED = {"bayesopt", "sensitivity"}


def planned(row: str) -> RankPlan:
    recipe = replace(RECIPE, sharing=SHARING, calibration=RandomTokens(count=8), allocation=strategy(row))
    dense = unfused(tiny_random("mixtral", layers=2))
    return compress(dense, recipe, Workspace(Cache(None), Progress(quiet=True))).plan


def kept(plan: RankPlan, layer: int) -> float:
    """The share that the experts of a layer keep."""
    groups = [p for p in plan.groups if p.group.is_routed and p.group.blocks == (layer,)]
    return sum(p.parameters for p in groups) / sum(p.group.parameters for p in groups)


@pytest.mark.parametrize("option", sorted(options("allocation") - MEASURED))
def test_every_allocation_plans_experts_within_its_budget(option: str) -> None:
    plan = planned(f"allocation={option}")
    assert plan.retain_ratio <= 0.6
    assert sum(p.group.size for p in plan.groups if p.group.is_routed) == 2 * 4 * 3


def test_numbers_by_layer_are_those_of_the_experts_in_it() -> None:
    group = WeightGroup("expert_up", (ExpertPlace(0, 1), ExpertPlace(0, 2), ExpertPlace(2, 0)), 8, 6)
    assert mean_over_layers(group, {0: 0.3, 1: 5.0, 2: 0.9}) == pytest.approx(0.5)
    plan = planned("allocation=manual allocation.by_layer=[1.0,0.4]")
    assert kept(plan, 1) < 0.6 * kept(plan, 0)
    bounded = planned("allocation=water_filling 'allocation.layer_bounds={0:[0.8,1.0]}'".replace("'", ""))
    assert kept(bounded, 0) > 0.75 > 0.6 > kept(bounded, 1)
