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


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_a_scaled_gradient_of_close_half_precision_logits_is_not_rounded_away(temperature: float) -> None:
    """As mixed-precision training scales losses: most of the gradient itself is below what fp16 holds."""
    random = torch.Generator().manual_seed(0)
    target = torch.randn(4, 2000, generator=random)
    logits = (target + 0.01 * torch.randn(4, 2000, generator=random)).half().requires_grad_()
    target = target.half()
    exact = logits.detach().double().requires_grad_()
    for given in (logits, exact):
        (kl_divergence(given, target.to(given.dtype), temperature) * 65536.0).backward()
    assert logits.grad is not None and exact.grad is not None
    assert float((logits.grad.double() - exact.grad).norm() / exact.grad.norm()) < 1e-3


def test_some_tokens_alone_and_no_others() -> None:
    logits, target = (torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    logits.requires_grad_()
    chosen = torch.tensor([0, 4])
    measured = kl_divergence(logits, target, tokens=chosen)
    alone = kl_divergence(logits.flatten(0, 1)[chosen], target.flatten(0, 1)[chosen])
    torch.testing.assert_close(measured, alone)
    [gradient] = torch.autograd.grad(measured, logits)
    assert bool(gradient.flatten(0, 1)[chosen].any(dim=1).all()) and int(gradient.any(dim=2).sum()) == 2
    with pytest.raises(ValueError, match="cannot be compared"):
        kl_divergence(logits, target[:, :2])
