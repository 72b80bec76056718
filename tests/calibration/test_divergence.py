"""Statistics of the divergence from another model's predictions: autograd's, whichever way the model runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bs_exp.calibration import walk
from bs_exp.calibration.group_statistics import statistics_key
from bs_exp.models.architecture import module_of
from bs_exp.models.loading import LocalModel
from bs_exp.models.model_inputs import IGNORED, feeder
from bs_exp.models.tiny import tiny_random
from bs_exp.types import CalibrationData, LoadedModel, Statistic, TokenWindows
from tests.support.gathered import gathered

WINDOWS = TokenWindows(
    ids=torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(0)), provenance={"sha256": "x"}
)
DATA = CalibrationData(WINDOWS, 2)
KINDS = (Statistic.LOSS_GRADIENT, Statistic.OUTPUT_GRAM)


def gradients(model: LoadedModel, towards: LoadedModel) -> dict[str, Tensor]:
    """Oracle: the gradient of every matrix, by autograd, from probabilities that are written out."""
    examples = feeder(model, WINDOWS.feeding).examples(WINDOWS.ids)
    predicted = examples.labels != IGNORED
    with torch.no_grad():
        wanted = towards.module(**examples.inputs).logits[predicted].softmax(-1)
    found = model.module(**examples.inputs).logits[predicted].softmax(-1)
    matrices = model.architecture.matrices
    weights = [module_of(model.module, matrix).weight for matrix in matrices]
    loss = (wanted * (wanted.log() - found.log())).sum()
    by_weight = torch.autograd.grad(loss, weights)
    return {
        matrix.module: gradient.T if gradient.shape == (matrix.d_out, matrix.d_in) else gradient
        for matrix, gradient in zip(matrices, by_weight, strict=True)
    }


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_gradients_are_those_of_the_divergence(family: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(walk, "LARGE", 0)
    model, towards = tiny_random(family), tiny_random(family, seed=1)
    found = gathered(model, replace(DATA, towards=towards), *KINDS)
    for name, expected in gradients(model, towards).items():
        gradient = found[Statistic.LOSS_GRADIENT][name]["gradient"]
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_nothing_draws_a_model_away_from_itself() -> None:
    model = tiny_random()
    found = gathered(model, replace(DATA, towards=tiny_random()), *KINDS)
    with_labels = gathered(model, DATA, *KINDS)
    for name, tensors in found[Statistic.LOSS_GRADIENT].items():
        largest = float(with_labels[Statistic.LOSS_GRADIENT][name]["gradient"].abs().max())
        assert float(tensors["gradient"].abs().max()) < 1e-5 * largest


def test_models_in_files_give_the_same(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        model = tiny_random(seed=seed)
        model.module.save_pretrained(tmp_path / str(seed))
        model.tokenizer.save_pretrained(tmp_path / str(seed))
    for offload in ("none", "disk"):
        one, other = (LocalModel(path=str(tmp_path / s), device="cpu", offload=offload).load() for s in "01")
        found.append(gathered(one, replace(DATA, towards=other), *KINDS))
    for kind in KINDS:
        for name, tensors in found[0][kind].items():
            for part, tensor in tensors.items():
                torch.testing.assert_close(found[1][kind][name][part], tensor, rtol=1e-5, atol=1e-8)


def test_what_is_cached_is_of_that_model() -> None:
    model = tiny_random()
    keys = {statistics_key(model, replace(DATA, towards=each)) for each in (None, model, tiny_random(seed=1))}
    assert len(keys) == 3
