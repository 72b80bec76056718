"""Rounds end at the budget, and no step is larger or smaller than asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bs_exp.allocation.water_filling import WaterFilling
from bs_exp.cache import Cache
from bs_exp.errors import ConfigError
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress
from bs_exp.progress import Progress
from bs_exp.protocols import Layout, Update
from bs_exp.schedule.adaptive_steps import AdaptiveSteps
from bs_exp.schedule.single import SingleRound
from bs_exp.schedule.steps import EqualSteps
from bs_exp.sharing.none import NoSharing
from bs_exp.testing.schedule import rounds
from bs_exp.types import LossUnit
from bs_exp.update.none import NoUpdate
from bs_exp.update.refit import Refit
from bs_exp.whitening.two_sided import TwoSidedWhitening
from bs_exp.workspace import Workspace
from tests.support.recipes import RECIPE

REFIT = Refit(mode="sequential", inputs="compressed", target="mixed", beta=None, gram="layer", ridge=1e-6, below=None)


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


def test_steps_that_would_never_arrive_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^size must be at least 0\.001 .*got 1e-07.*schedule=single"):
        EqualSteps(size=1e-7)
    with pytest.raises(ConfigError, match=r"^min_size must be at least 0\.001"):
        AdaptiveSteps(max_loss=0.1, min_size=1e-9, max_size=1e-9)
    assert len(rounds(EqualSteps(size=0.001), 0.99, lambda ratio: 0.0)) == 10


@pytest.mark.parametrize("update", [NoUpdate(), REFIT])
@pytest.mark.parametrize("layout", [PlainLayout(), PivotedLayout()])
def test_a_block_that_was_added_as_zeros_gives_its_parameters_to_the_others(layout: Layout, update: Update) -> None:
    """Blocks are added to a trained model with zero outputs (LLaMA Pro, 2401.02415): nothing in them matters yet."""
    dense = tiny_random()
    block = dense.module.get_submodule("model.layers.1")
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()  # type: ignore[union-attr, operator]
        block.mlp.down_proj.weight.zero_()  # type: ignore[union-attr, operator]
    recipe = replace(
        RECIPE,
        sharing=NoSharing(),
        whitening=TwoSidedWhitening(ridge=1e-6, damping=1e-4, temper=1.0),
        allocation=WaterFilling(min_ratio=0.0),
        layout=layout,
        schedule=EqualSteps(size=0.2),
        update=update,
        retain_ratio=0.6,
    )
    made = compress(dense, recipe, Workspace(Cache(None), Progress(quiet=True)))
    ranks = {layer: [g.rank for g in made.plan.groups if g.group.layers == (layer,)] for layer in range(3)}
    assert set(ranks[1]) == {1} and all(rank is None or rank > 1 for rank in ranks[0] + ranks[2])
    ids = torch.arange(20)[None]
    with torch.no_grad():
        one, other = (model(input_ids=ids).logits for model in (dense.module, made.module))
    assert torch.nn.functional.cosine_similarity(one, other, dim=-1).mean() > 0.8


def test_every_round_has_statistics_of_its_own_and_is_found_again(tmp_path: object) -> None:
    recipe = replace(
        RECIPE,
        whitening=TwoSidedWhitening(ridge=1e-6, damping=1e-4, temper=1.0),
        allocation=WaterFilling(min_ratio=0.0),
        schedule=EqualSteps(size=0.1),
        retain_ratio=0.8,
    )
    dense, cache = tiny_random(), Cache(None)
    made = compress(dense, recipe, Workspace(cache, Progress(quiet=True)))
    assert made.rounds == (0.9, 0.8)
    assert all(group.loss_unit is LossUnit.NATS for group in made.plan.groups)
    once = cache.misses["decomposition"]
    assert once == 2 * len(made.plan.groups)
    again = compress(dense, recipe, Workspace(cache, Progress(quiet=True)))
    assert again.plan == made.plan and cache.misses["decomposition"] == once
    single = compress(dense, replace(recipe, schedule=SingleRound()), Workspace(cache, Progress(quiet=True)))
    assert single.plan != made.plan
