"""Squared gradients of outputs and weights are what the formulas say, gathered without touching the parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bs_exp.models.architecture import module_of
from bs_exp.models.tiny import tiny_random
from bs_exp.types import CalibrationData, LoadedModel, Statistic, TokenWindows
from tests.support.gathered import Found, gathered

BOTH = (Statistic.OUTPUT_GRAM, Statistic.WEIGHT_GRADIENT)


def gather(model: LoadedModel, ids: Tensor, *statistics: Statistic, batch_size: int = 2) -> Found:
    return gathered(model, CalibrationData(TokenWindows(ids=ids, provenance={}), batch_size), *statistics)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_bias_gradients_are_sums_of_output_gradients(family: str) -> None:
    """Oracle: with one predicted token per sequence position, autograd's own weight gradient is `x^T g`."""
    model = tiny_random(family)
    ids = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))
    grams = gather(model, ids, *BOTH)[Statistic.OUTPUT_GRAM]
    for matrix in model.architecture.matrices[:: max(1, len(model.architecture.matrices) // 5)]:
        module = module_of(model.module, matrix)
        captured: dict[str, torch.Tensor] = {}

        def add_probe(
            layer: object, arguments: object, output: torch.Tensor, kept: dict[str, torch.Tensor] = captured
        ) -> torch.Tensor:
            kept["probe"] = torch.zeros_like(output, requires_grad=True)
            return output + kept["probe"]  # d loss / d probe is the gradient at the output

        handle = module.register_forward_hook(add_probe)
        logits = model.module(ids).logits
        handle.remove()
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        [gradient] = torch.autograd.grad(loss, captured["probe"])
        rows = gradient.reshape(-1, matrix.d_out).double()
        torch.testing.assert_close(grams[matrix.module]["gram"], rows.T @ rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "gpt_neox"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_weight_gradients_are_those_of_each_sequence(family: str, batch_size: int) -> None:
    """Oracle: autograd's own gradient of every weight, one sequence at a time; whatever the batches."""
    model = tiny_random(family)
    ids = torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(0))
    found = gather(model, ids, Statistic.WEIGHT_GRADIENT, batch_size=batch_size)
    modules = {m: module_of(model.module, m) for m in model.architecture.matrices}
    expected = {m: torch.zeros(m.d_in).double() for m in modules}
    for sequence in ids:
        logits = model.module(sequence[None]).logits
        loss = functional.cross_entropy(logits[0, :-1], sequence[1:], reduction="sum")
        gradients = torch.autograd.grad(loss, [module.weight for module in modules.values()])
        for (matrix, module), gradient in zip(modules.items(), gradients, strict=True):
            inputs_axis = 1 if isinstance(module, nn.Linear) else 0
            expected[matrix] += gradient.double().square().sum(1 - inputs_axis) / len(ids)
    for matrix, rows in expected.items():
        torch.testing.assert_close(found[Statistic.WEIGHT_GRADIENT][matrix.module]["rows"], rows, rtol=1e-3, atol=1e-7)


def test_parameters_keep_their_flags_and_get_no_gradients() -> None:
    model = tiny_random()
    frozen = model.module.get_input_embeddings().weight
    frozen.requires_grad_(False)
    ids = torch.randint(0, 256, (2, 12))
    gather(model, ids, *BOTH)
    assert not frozen.requires_grad
    others = [p for p in model.module.parameters() if p is not frozen]
    assert all(p.requires_grad and p.grad is None for p in others)
    assert sum(len(m._forward_hooks) for m in model.module.modules()) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_gradients_are_those_of_autograd(family: str) -> None:
    model = tiny_random(family)
    ids = torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(0))
    found = gather(model, ids, Statistic.LOSS_GRADIENT)[Statistic.LOSS_GRADIENT]
    modules = {m: module_of(model.module, m) for m in model.architecture.matrices}
    logits = model.module(ids).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, [module.weight for module in modules.values()])
    for (matrix, module), gradient in zip(modules.items(), gradients, strict=True):
        expected = gradient.mT if isinstance(module, nn.Linear) else gradient
        torch.testing.assert_close(found[matrix.module]["gradient"], expected, rtol=1e-3, atol=1e-5)
