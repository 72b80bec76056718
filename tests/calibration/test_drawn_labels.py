"""Gradients of drawn labels have, on average, the Hessian of the KL divergence as their second moment."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bs_exp.calibration.drawn_labels import drawn_loss
from bs_exp.models.model_inputs import IGNORED, Examples

LOGITS = torch.tensor([2.0, -1.0, 1.5, 0.3, 0.9, -2.0, 0.0])


@pytest.mark.parametrize("among", [None, 3])
def test_second_moment_is_the_hessian_of_the_kl(among: int | None) -> None:
    """Oracle: `diag(p) - p p^T` in numpy, with p of the three most probable tokens alone where `among` is 3."""
    windows, positions = 20, 1000
    ids = torch.randint(0, 256, (windows, positions), generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(windows, positions, dtype=torch.long)
    labels[:, -1] = IGNORED
    logits = LOGITS.expand(windows, positions, -1).clone().requires_grad_()
    drawn_loss(Examples({"input_ids": ids}, labels), logits, among=among).backward()
    assert logits.grad is not None and not bool(logits.grad[:, -1].any())
    rows = logits.grad[:, :-1].reshape(-1, len(LOGITS)).double().numpy()
    p = np.exp(LOGITS.double().numpy())
    if among is not None:
        p[np.argsort(p)[:-among]] = 0.0
    p /= p.sum()
    np.testing.assert_allclose(rows.T @ rows / len(rows), np.diag(p) - np.outer(p, p), atol=0.01)
    np.testing.assert_allclose(rows.mean(0), 0.0, atol=0.02)


def test_draws_belong_to_windows_and_not_to_batches() -> None:
    ids = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(4, 16, 9, generator=torch.Generator().manual_seed(1))
    parts = [slice(0, 1), slice(1, 4)]
    whole = drawn_loss(Examples({"input_ids": ids}, ids % 9), logits, among=None)
    apart = [drawn_loss(Examples({"input_ids": ids[part]}, ids[part] % 9), logits[part], among=None) for part in parts]
    torch.testing.assert_close(sum(apart), whole)
