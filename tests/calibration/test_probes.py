"""Grams of probes are, on average, those of the Jacobian; what cannot be probed is refused before any work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from bs_exp.cache import Cache
from bs_exp.calibration.group_statistics import calibrate, check_gatherable
from bs_exp.calibration.probes import probe_losses
from bs_exp.errors import ConfigError
from bs_exp.models.model_inputs import Examples, feeder, hidden_states, unlabelled
from bs_exp.models.pooling import pooled
from bs_exp.models.tiny import tiny_random
from bs_exp.progress import Progress
from bs_exp.types import (
    CalibrationData,
    LoadedModel,
    LossUnit,
    Pooling,
    Probes,
    Statistic,
    Task,
    TokenWindows,
    WeightGroup,
)
from bs_exp.whitening.two_sided import TwoSidedWhitening
from bs_exp.workspace import Workspace
from tests.support.encoders import headless

IDS = torch.randint(0, 256, (2, 5), generator=torch.Generator().manual_seed(0))
MEAN = Pooling(modes=("mean",), normalize=True)


def data(**probes: Any) -> CalibrationData:
    return CalibrationData(TokenWindows(ids=IDS, provenance={"sha256": "x"}), batch_size=2, probes=Probes(**probes))


def gram(model: LoadedModel, given: CalibrationData, group: WeightGroup) -> Tensor:
    stats = calibrate(
        model, given, needs={Statistic.PROBED_OUTPUT_GRAM}, workspace=Workspace(Cache(None), Progress(quiet=True))
    )
    found = stats.of(group, torch.device("cpu")).probed_grams
    assert found is not None
    return found[group.layers[0]]


def exact_gram(model: LoadedModel, name: str, of: str) -> Tensor:
    """`sum_t J_t^T J_t` by `torch.func.jacrev`, J_t the Jacobian of all outputs by what a matrix gives for token t."""
    module = model.module.get_submodule(name)
    inputs = feeder(model).inputs(IDS)
    with torch.no_grad():
        shape = []
        handle = module.register_forward_hook(lambda layer, given, output: shape.append(output.shape))
        hidden_states(model.module, inputs)
        handle.remove()

    def outputs(added: Tensor) -> Tensor:
        handle = module.register_forward_hook(lambda layer, given, output: output + added)
        try:
            found = hidden_states(model.module, inputs)
        finally:
            handle.remove()
        found = found if of == "hidden" else pooled(found, None, MEAN)
        return functional.normalize(found, dim=-1).flatten()

    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.func.jacrev(outputs)(torch.zeros(shape[0])).detach().double()
    rows = jacobian.flatten(1, -2)  # outputs x positions x channels
    return torch.einsum("opc,opd->cd", rows, rows)


@pytest.mark.parametrize(
    ("family", "of"), [("bert", "hidden"), ("bert", "embedding"), ("t5", "hidden"), ("llama", "hidden")]
)
def test_many_probes_give_the_gram_of_the_jacobian(family: str, of: str) -> None:
    model = replace(headless() if family == "bert" else tiny_random(family, layers=1), pooling=MEAN)
    matrix = model.architecture.matrices[-1 if family == "t5" else 2]
    group = WeightGroup(matrix.matrix, (matrix.layer,), matrix.d_in, matrix.d_out)
    wanted = exact_gram(model, matrix.module, of)
    errors = [float((gram(model, data(count=n, of=of), group) - wanted).norm() / wanted.norm()) for n in (20, 1200)]
    assert errors[1] < 0.09
    assert errors[1] < errors[0] / 3


def test_probes_belong_to_windows_and_each_adds_to_those_before() -> None:
    model = headless()
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))

    def losses(rows: slice, count: int) -> list[float]:
        examples = unlabelled(feeder(model), IDS[rows])
        return [float(each) * count**0.5 for each in probe_losses(examples, hidden[rows], model, Probes(count=count))]

    whole = losses(slice(0, 2), 3)
    assert [sum(pair) for pair in zip(losses(slice(0, 1), 3), losses(slice(1, 2), 3), strict=True)] == pytest.approx(
        whole
    )
    assert losses(slice(0, 2), 2) == pytest.approx(whole[:2])


@pytest.mark.parametrize("of", ["hidden", "embedding"])
def test_padding_is_not_probed(of: str) -> None:
    """A window behind which padding stands has the gradients that it has alone."""
    model = replace(headless(), pooling=MEAN)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    gradients = []
    for inputs in ({"input_ids": IDS[:1, :3]}, {"input_ids": IDS[:1], "attention_mask": mask}):
        states = hidden_states(model.module, inputs).detach()
        states[:, :3] = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
        states.requires_grad_()
        for loss in _sums(model, inputs, states, of):
            loss.backward()
        assert states.grad is not None
        gradients.append(states.grad)
    assert not bool(gradients[1][:, 3:].any())
    assert bool(gradients[1][:, :3].any())
    # Directions are drawn by the window's own ids, which differ here, so only the form can be compared.
    rank = [int(torch.linalg.matrix_rank(found[0, :3], rtol=1e-5)) for found in gradients]
    assert rank == ([3, 3] if of == "hidden" else [1, 1])


def _sums(model: LoadedModel, inputs: Any, states: Tensor, of: Any) -> list[Tensor]:
    return list(probe_losses(Examples(inputs, inputs["input_ids"]), states, model, Probes(of=of)))


def test_a_model_without_logits_is_probed_by_default() -> None:
    whitening = TwoSidedWhitening(ridge=1e-6, damping=1e-4, temper=1.0, probes=2)
    assert whitening.for_model(tiny_random("bert")).needs == {Statistic.GRAM, Statistic.OUTPUT_GRAM}
    chosen = whitening.for_model(headless())
    assert chosen.needs == {Statistic.GRAM, Statistic.PROBED_OUTPUT_GRAM}
    stats = calibrate(
        headless(), data(count=2), needs=chosen.needs, workspace=Workspace(Cache(None), Progress(quiet=True))
    )
    metric = chosen.metric(stats.of(WeightGroup("q", (0,), 32, 32), torch.device("cpu")))
    assert metric.unit is LossUnit.COSINE


class Wordless(PreTrainedModel):
    """Gives a tuple, no tensor."""

    def forward(self, input_ids: Tensor) -> tuple[int, ...]:
        return (1, 2)


def test_what_cannot_be_probed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, needs = headless(), {"TwoSidedWhitening": frozenset({Statistic.PROBED_OUTPUT_GRAM})}
    with pytest.raises(ConfigError, match=r"probed=embedding needs a sentence-transformers model.*BertModel"):
        check_gatherable(model, data(of="embedding"), needs)
    monkeypatch.setattr(type(model.module), "forward", Wordless.forward)
    assert model.task is Task.ENCODER
    with pytest.raises(ConfigError, match=r"curvature=probes needs last hidden states.*BertModel gives none \("):
        check_gatherable(model, data(), needs)
