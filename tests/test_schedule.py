"""Rounds end at the budget, and no step is larger or smaller than asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from test_pipeline import RECIPE

from bs_exp.allocation.water_filling import WaterFilling
from bs_exp.cache import Cache
from bs_exp.errors import ConfigError
from bs_exp.journal import Journal
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress
from bs_exp.protocols import Schedule
from bs_exp.schedule.adaptive_steps import AdaptiveSteps
from bs_exp.schedule.single import SingleRound
from bs_exp.schedule.steps import EqualSteps
from bs_exp.types import LossUnit
from bs_exp.whitening.two_sided import TwoSidedWhitening


def rounds(schedule: Schedule, target: float, loss_at: Callable[[float], float]) -> list[float]:
    ratios = [1.0]
    while ratios[-1] > target:
        ratios.append(schedule.next_ratio(ratios[-1], target, loss_at))
        assert target <= ratios[-1] < ratios[-2]
        assert len(ratios) < 100
    return ratios[1:]


def test_equal_steps_are_decimals_and_spread_no_crumbs() -> None:
    assert rounds(EqualSteps(size=0.05), 0.8, lambda ratio: 0.0) == [0.95, 0.9, 0.85, 0.8]
    assert rounds(EqualSteps(size=0.05), 0.88, lambda ratio: 0.0) == [0.95, 0.88]


def test_adaptive_steps_are_as_large_as_the_loss_allows() -> None:
    steps = AdaptiveSteps(max_loss=0.01, min_size=0.01, max_size=0.5)
    first, *_ = rounds(steps, 0.5, lambda ratio: 0.1 * (1.0 - ratio))
    assert first == pytest.approx(0.9, abs=0.002)
    assert rounds(steps, 0.5, lambda ratio: 0.0) == [0.5]


@pytest.mark.parametrize("size", [0.0, -0.1, 1.1])
def test_step_sizes_out_of_range(size: float) -> None:
    with pytest.raises(ConfigError, match="size must be above 0"):
        EqualSteps(size=size)
    with pytest.raises(ConfigError, match="min_size"):
        AdaptiveSteps(max_loss=0.1, min_size=size, max_size=0.2)


def test_every_round_has_statistics_of_its_own_and_is_found_again(tmp_path: object) -> None:
    recipe = replace(
        RECIPE,
        whitening=TwoSidedWhitening(ridge=1e-6, damping=1e-4, temper=1.0),
        allocation=WaterFilling(min_ratio=0.0),
        schedule=EqualSteps(size=0.1),
        retain_ratio=0.8,
    )
    dense, cache = tiny_random(), Cache(None)
    made = compress(dense, recipe, cache, Journal(quiet=True))
    assert made.rounds == (0.9, 0.8)
    assert all(group.loss_unit is LossUnit.NATS for group in made.plan.groups)
    once = cache.misses["decomposition"]
    assert once == 2 * len(made.plan.groups)
    again = compress(dense, recipe, cache, Journal(quiet=True))
    assert again.plan == made.plan and cache.misses["decomposition"] == once
    single = compress(dense, replace(recipe, schedule=SingleRound()), cache, Journal(quiet=True))
    assert single.plan != made.plan
