"""Output Grams are second moments of loss gradients, gathered without touching the parameters."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from bs_exp.calibration.gradients import gather_output_grams
from bs_exp.journal import Journal
from bs_exp.models.architecture import module_of
from bs_exp.models.tiny import tiny_random
from bs_exp.types import TokenWindows


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_bias_gradients_are_sums_of_output_gradients(family: str) -> None:
    """Oracle: with one predicted token per sequence position, autograd's own weight gradient is `x^T g`."""
    model = tiny_random(family)
    ids = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))
    grams = gather_output_grams(model, TokenWindows(ids=ids, provenance={}), batch_size=2, journal=Journal(quiet=True))
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
        torch.testing.assert_close(grams[matrix.module], rows.T @ rows, rtol=1e-4, atol=1e-5)


def test_parameters_keep_their_flags_and_get_no_gradients() -> None:
    model = tiny_random()
    frozen = model.module.get_input_embeddings().weight
    frozen.requires_grad_(False)
    ids = torch.randint(0, 256, (2, 12))
    gather_output_grams(model, TokenWindows(ids=ids, provenance={}), batch_size=2, journal=Journal(quiet=True))
    assert not frozen.requires_grad
    others = [p for p in model.module.parameters() if p is not frozen]
    assert all(p.requires_grad and p.grad is None for p in others)
    assert sum(len(m._forward_hooks) for m in model.module.modules()) == 0
