"""What a training minimises: the KL divergence in pieces is that of whole distributions, with its gradient."""

from __future__ import annotations

import pytest
import torch

from bs_exp.models.divergence import kl_divergence


@pytest.mark.parametrize("logits_at_once", [1, 20, 1000], ids=["rows", "pairs of rows, the last alone", "whole"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_in_pieces(temperature: float, dtype: torch.dtype, logits_at_once: int) -> None:
    random = torch.Generator().manual_seed(0)
    logits, target = (3.0 * torch.randn(3, 3, 10, generator=random).to(dtype) for _ in range(2))
    logits.requires_grad_()
    ours, theirs = (torch.distributions.Categorical(logits=x.double() / temperature) for x in (target, logits))
    expected = temperature**2 * torch.distributions.kl_divergence(ours, theirs).sum()
    [gradient] = torch.autograd.grad(expected, logits)
    measured = kl_divergence(logits, target, temperature, logits_at_once=logits_at_once)
    assert measured.item() == pytest.approx(expected.item(), rel=1e-5)
    [own] = torch.autograd.grad(measured, logits)
    torch.testing.assert_close(own, gradient)
