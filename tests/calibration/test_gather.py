"""Any statistics can be gathered together, in one pass for each loss; what is not finite is named, whichever way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from bs_exp.calibration import gather, walk
from bs_exp.calibration.gather import ACCUMULATORS
from bs_exp.calibration.statistics import Loss, Place, Seen, Subject, subjects
from bs_exp.errors import CalibrationError
from bs_exp.models.architecture import module_of
from bs_exp.models.tiny import tiny_random
from bs_exp.processes import largest
from bs_exp.types import CalibrationData, Statistic, TokenWindows
from tests.support.gathered import gathered

WINDOWS = TokenWindows(ids=torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(0)), provenance={})
DATA = CalibrationData(WINDOWS, 2)


@pytest.fixture(params=["as a whole", "by blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "by blocks":
        monkeypatch.setattr(walk, "LARGE", 0)
    yield request.param


def test_every_statistic_has_an_accumulator() -> None:
    assert ACCUMULATORS.keys() == set(Statistic)


def test_together_they_are_what_they_are_alone(way: str) -> None:
    model = tiny_random()
    together = gathered(model, DATA, *Statistic)
    for statistic in Statistic:
        alone = gathered(model, DATA, statistic)[statistic]
        assert together[statistic].keys() == alone.keys()
        for name, tensors in alone.items():
            assert tensors.keys() == together[statistic][name].keys()
            assert all(torch.equal(tensors[key], together[statistic][name][key]) for key in tensors)


def test_what_needs_the_same_loss_comes_from_one_pass() -> None:
    model, passes = tiny_random(), []
    model.module.get_input_embeddings().register_forward_hook(lambda layer, args, output: passes.append(layer))
    gathered(model, DATA, *Statistic)
    # Summed loss with what needs none, mean loss, two of drawn labels, probes; three batches each.
    assert len(passes) == 5 * 3


@pytest.mark.parametrize("family", ["t5", "bert", "mixtral"])
def test_what_needs_no_loss_comes_along_where_it_reads_the_same(family: str, way: str) -> None:
    """Masked language models read masks with a loss, and none without one or with probes."""
    model = tiny_random(family)
    wanted = {Statistic.GRAM, Statistic.INPUT_MOMENTS, Statistic.OUTPUT_GRAM}
    losses = [loss for loss, _ in gather.passes(model, wanted)]
    assert losses == (["sum"] if way == "as a whole" and family != "bert" else [None, "sum"])
    probed = [loss for loss, _ in gather.passes(model, {Statistic.GRAM, Statistic.PROBED_OUTPUT_GRAM})]
    assert probed == (["probes"] if way == "as a whole" else [None, "probes"])
    for loss in (Statistic.OUTPUT_GRAM, Statistic.PROBED_OUTPUT_GRAM):
        along, alone = (gathered(model, DATA, Statistic.GRAM, *more)[Statistic.GRAM] for more in ([loss], []))
        assert all(torch.equal(along[site]["gram"], found["gram"]) for site, found in alone.items())


def test_statistics_that_take_much_memory_have_a_pass_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, wanted = tiny_random(), {Statistic.GRAM, Statistic.OUTPUT_GRAM}
    numbers = sum(s.matrices[0].d_in ** 2 for s in subjects(model.architecture, Place.INPUT))
    for limit, losses in ((numbers, ["sum"]), (numbers - 1, [None, "sum"])):
        monkeypatch.setattr(gather, "_ALONG", limit)
        assert [loss for loss, _ in gather.passes(model, wanted)] == losses


def test_subjects_are_sites_matrices_and_blocks() -> None:
    architecture = tiny_random("llama").architecture
    assert [s.name for s in subjects(architecture, Place.BLOCK_OUTPUT)] == ["0", "1", "2"]
    assert [s.name for s in subjects(architecture, Place.OUTPUT_GRADIENT)] == [m.module for m in architecture.matrices]
    sites = subjects(architecture, Place.INPUT)
    assert [s.name for s in sites[:4]] == ["0.attn_in", "0.attn_out", "0.mlp_in", "0.mlp_hidden"]
    for place in Place:
        found = subjects(architecture, place)
        assert [m for s in found for m in s.matrices] == list(architecture.matrices)
        assert all(m.layer == s.layer for s in found for m in s.matrices)


def test_a_new_statistic_is_a_class_and_a_row(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class GradientPeak:
        place: ClassVar[Place] = Place.WEIGHT_GRADIENT
        loss: ClassVar[Loss | None] = "sum"
        reads_inputs: ClassVar[bool] = False

        def __init__(self, subject: Subject, *, batches: int) -> None:
            self._peak = 0.0

        def add(self, seen: Seen) -> None:
            self._peak = max(self._peak, float(seen.values.abs().max()))

        def combine(self) -> None:
            self._peak = float(largest(torch.tensor(self._peak)))

        def tensors(self) -> dict[str, Tensor]:
            return {"peak": torch.tensor(self._peak)}

    monkeypatch.setattr(gather, "ACCUMULATORS", {**ACCUMULATORS, Statistic.SENSITIVITY: GradientPeak})
    model = tiny_random()
    # With statistics at another place, of the same loss and so in the same pass.
    found = gathered(model, DATA, Statistic.SENSITIVITY, Statistic.OUTPUT_GRAM)
    expected = [0.0] * 3
    for ids in DATA.batches:
        logits = model.module(ids).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
        matrices = model.architecture.matrices
        weights = [module_of(model.module, m).weight for m in matrices]
        for matrix, gradient in zip(matrices, torch.autograd.grad(loss, weights), strict=True):
            expected[matrix.layer] = max(expected[matrix.layer], float(gradient.abs().max()))
    peaks = [float(tensors["peak"]) for tensors in found[Statistic.SENSITIVITY].values()]
    assert peaks == pytest.approx(expected, rel=1e-4)
    alone = gathered(model, DATA, Statistic.OUTPUT_GRAM)[Statistic.OUTPUT_GRAM]
    for name, tensors in found[Statistic.OUTPUT_GRAM].items():
        torch.testing.assert_close(tensors["gram"], alone[name]["gram"])


@pytest.mark.parametrize(
    ("statistic", "message"),
    [
        (Statistic.GRAM, r"inputs of model\.layers\.1\.mlp\.gate_proj, model\.layers\.1\.mlp\.up_proj hold NaN.* lost"),
        (Statistic.BLOCK_OUTPUTS, r"outputs of layer 1 hold NaN"),
        (Statistic.OUTPUT_GRAM, r"loss gradients at model\.layers\.2\.mlp\.down_proj hold NaN"),
        (Statistic.WEIGHT_GRADIENT, r"loss gradients at model\.layers\.2\.mlp\.down_proj hold NaN"),
        (Statistic.SENSITIVITY, r"loss gradients of layer 0 hold NaN"),
    ],
)
def test_what_is_not_finite_is_named(statistic: Statistic, message: str, way: str) -> None:
    model = tiny_random()
    with torch.no_grad():
        module_of(model.module, model.architecture.by_position["o", 1]).weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=message):
        gathered(model, DATA, statistic)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.module.modules())
