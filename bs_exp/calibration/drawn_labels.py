"""The loss of labels that a model draws from its own predictions, whose gradients make the curvature of the KL."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from bs_exp.models.model_inputs import IGNORED, Examples, window_generator

# Tokens that `top_k` draws from: IO-SVD (2605.15626) keeps about so many.
MOST_PROBABLE = 5


def drawn_loss(
    examples: Examples, logits: Float[Tensor, "windows positions vocabulary"], *, among: int | None, seed: int = 0
) -> Tensor:
    """Cross entropy, summed in nats, of labels drawn from the predictions p; from the `among` most probable if given.

    With a label c drawn from p, `E[(e_c - p)(e_c - p)^T] = diag(p) - p p^T`, the Hessian of the KL divergence from p by
    the logits; drawn apart at every position, the Grams of the gradients behind it are unbiased for `J^T (.) J`, with J
    the Jacobian of all logits. With `among`, p is that of these tokens alone, whose logits alone get a gradient.
    Draws depend on a window's own ids, not on its batch.
    Martens (1412.1193), section 5; the most probable tokens: IO-SVD (2605.15626).
    """
    kept = logits if among is None else logits.topk(min(among, logits.shape[-1])).values
    windows = examples.inputs["input_ids"].cpu()
    points = torch.stack([torch.rand(kept.shape[1], generator=window_generator(window, seed)) for window in windows])
    predicted = examples.labels != IGNORED
    rows = kept[predicted].float()
    rising = rows.detach().softmax(-1).cumsum(-1)
    below = rising < (points.to(rows.device)[predicted] * rising[:, -1])[:, None]
    return functional.cross_entropy(rows, below.sum(-1).clamp_max(rows.shape[-1] - 1), reduction="sum")
