"""A compression is the same wherever it is computed; `make test-gpu` runs these on a CUDA device, too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bs_exp.allocation.water_filling import WaterFilling
from bs_exp.cache import Cache
from bs_exp.calibration.statistics import summed
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.models.loading import LocalModel
from bs_exp.models.surgery import to_dense
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import Recipe, compress
from bs_exp.testing.models import QUIET
from bs_exp.types import CompressedModel
from bs_exp.update.natural_gradient import NaturalGradient
from bs_exp.whitening.two_sided import TwoSidedWhitening
from bs_exp.workspace import Workspace
from tests.support.recipes import RECIPE

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BEST = replace(
    RECIPE,
    whitening=TwoSidedWhitening(ridge=1e-6, damping=1e-4, temper=1.0),
    allocation=WaterFilling(min_ratio=0.0),
    layout=PivotedLayout(),
)
STEP = NaturalGradient(
    loss="divergence", steps=1, windows=8, ridge=0.01, damping=1.0, holdout=0.25, first_length=0.03, seed=0
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("devices") / "model"
    dense = tiny_random()
    dense.module.save_pretrained(found)
    dense.tokenizer.save_pretrained(found)
    return found


def compressed(folder: Path, recipe: Recipe, **place: str) -> CompressedModel:
    return compress(LocalModel(path=str(folder), **place).load(), recipe, Workspace(Cache(None), QUIET))


def ranks(made: CompressedModel) -> list[int | None]:
    return [planned.rank for planned in made.plan.groups]


@pytest.mark.parametrize("recipe", [RECIPE, BEST, replace(BEST, update=STEP)], ids=["grams", "two-sided", "a step"])
@pytest.mark.parametrize("offload", ["none", "disk"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_same_model_wherever_it_is_made(device: str, offload: str, recipe: Recipe, folder: Path) -> None:
    found, expected = (
        compressed(folder, recipe, device=device, offload=offload),
        compressed(folder, recipe, device="cpu", offload="none"),
    )
    assert ranks(found) == ranks(expected)
    weights, others = to_dense(found.module).state_dict(), to_dense(expected.module).state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(weight.cpu(), others[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("device", DEVICES)
def test_sums_are_in_fp64_and_stay_where_a_device_has_it(device: str) -> None:
    products = torch.full((3, 3), 1.0 + 2**-20, device=device)
    total = torch.zeros(3, 3, dtype=torch.float64)
    for _ in range(1000):
        total = summed(total, products)
    assert total.dtype == torch.float64 and total.device.type == device
    assert torch.equal(total.cpu(), torch.full((3, 3), 1000.0 * (1.0 + 2**-20), dtype=torch.float64))


@pytest.mark.gpu
def test_a_device_without_room_leaves_decompositions_to_the_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eigh = torch.linalg.eigh

    def cramped(matrix: torch.Tensor) -> object:
        if matrix.device.type == "cuda":
            torch.empty(2**50, device="cuda")  # the device's own error
        return eigh(matrix)

    expected = compressed(folder, RECIPE, device="cpu")
    monkeypatch.setattr(torch.linalg, "eigh", cramped)
    found = compressed(folder, RECIPE, device="cuda")
    assert ranks(found) == ranks(expected)
