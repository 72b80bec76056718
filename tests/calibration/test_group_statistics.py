"""Statistics are gathered when a strategy asks, in as few passes as can be, once; a group has its layers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bs_exp.cache import Cache
from bs_exp.calibration.group_statistics import OF_MATRICES, CalibrationStats, calibrate
from bs_exp.models.tiny import tiny_random
from bs_exp.progress import Progress
from bs_exp.types import CalibrationData, Statistic, TokenWindows, WeightGroup
from bs_exp.workspace import Workspace

WINDOWS = TokenWindows(
    ids=torch.randint(0, 256, (6, 16), generator=torch.Generator().manual_seed(0)), provenance={"sha256": "random"}
)
CPU = torch.device("cpu")


DATA = CalibrationData(WINDOWS, batch_size=2)


def gathered(*needs: Statistic, cache: Cache | None = None) -> CalibrationStats:
    return calibrate(
        tiny_random(),
        DATA,
        needs=set(needs),
        workspace=Workspace(cache or Cache(None), Progress(quiet=True)),
    )


@pytest.mark.parametrize("statistic", sorted(OF_MATRICES))
def test_nothing_is_gathered_that_nobody_asked_for(statistic: Statistic) -> None:
    cache = Cache(None)
    found = gathered(statistic, cache=cache).of(WeightGroup("q", (0, 1), 32, 32), CPU)
    present = {
        Statistic.GRAM: found.gram,
        Statistic.OUTPUT_GRAM: found.output_grams,
        Statistic.INPUT_MOMENTS: found.moments,
        Statistic.WEIGHT_GRADIENT: found.weight_gradient,
        Statistic.LOSS_GRADIENT: found.loss_gradient,
        Statistic.SAMPLED_OUTPUT_GRAM: found.sampled_grams,
        Statistic.TOP_K_OUTPUT_GRAM: found.top_k_grams,
        Statistic.PROBED_OUTPUT_GRAM: found.probed_grams,
    }
    assert {name for name, value in present.items() if value is not None} == {statistic}
    assert set(cache.misses) == {statistic}


def test_a_group_has_the_moments_of_its_layers_inputs_stacked() -> None:
    stats = gathered(Statistic.INPUT_MOMENTS)
    pair = stats.of(WeightGroup("q", (0, 2), 32, 32), CPU).moments
    alone = [stats.of(WeightGroup("q", (layer,), 32, 32), CPU).moments for layer in (0, 2)]
    assert pair is not None and alone[0] is not None and alone[1] is not None
    torch.testing.assert_close(pair.absolute, (alone[0].absolute + alone[1].absolute) / 2)
    torch.testing.assert_close(pair.fourth, (alone[0].fourth + alone[1].fourth) / 2)
    assert torch.equal(pair.peak, torch.maximum(alone[0].peak, alone[1].peak))


def test_a_group_has_the_squared_gradients_of_all_its_columns() -> None:
    stats = gathered(Statistic.WEIGHT_GRADIENT)
    gradients = {
        layers: stats.of(WeightGroup("up", layers, 32, 64), CPU).weight_gradient
        for layers in ((0,), (1,), (2,), (0, 2), (0, 1, 2))
    }
    rows = {layers: g.rows for layers, g in gradients.items() if g is not None}
    torch.testing.assert_close(rows[0, 2], rows[0,] + rows[2,])
    sensitivity = {layers: g.sensitivity for layers, g in gradients.items() if g is not None}
    assert sensitivity[0, 1, 2] == pytest.approx(1.0)
    mean_square = sum(float(rows[layer,].sum()) for layer in range(3)) / 3
    for layer in range(3):
        assert sensitivity[layer,] == pytest.approx((float(rows[layer,].sum()) / mean_square) ** 0.5)


def test_statistics_of_one_pass_come_from_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []

    def count(module: object, arguments: object, output: object) -> None:
        passes.append(module)

    model = tiny_random()
    handle = model.module.get_input_embeddings().register_forward_hook(count)
    calibrate(model, DATA, needs=OF_MATRICES, workspace=Workspace(Cache(None), Progress(quiet=True)))
    handle.remove()
    assert len(passes) == 4 * 3  # forward with backward for four losses, in three batches each


def test_what_the_cache_has_is_not_gathered_again(tmp_path: Path) -> None:
    first = gathered(Statistic.GRAM, cache=Cache(tmp_path))
    second = Cache(tmp_path)
    both = gathered(Statistic.GRAM, Statistic.INPUT_MOMENTS, cache=second)
    assert second.misses[Statistic.GRAM] == 0 and second.misses[Statistic.INPUT_MOMENTS] > 0
    third = Cache(tmp_path)
    again = gathered(*OF_MATRICES, cache=third)
    assert set(third.misses) == OF_MATRICES - {Statistic.GRAM, Statistic.INPUT_MOMENTS}
    group = WeightGroup("q", (0,), 32, 32)
    for stats in (both, again):
        found, expected = stats.of(group, CPU).gram, first.of(group, CPU).gram
        assert found is not None and expected is not None and torch.equal(found, expected)
