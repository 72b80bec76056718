"""How far predictions are from others, in pieces that fit into memory."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Numbers per piece of a comparison: its fp32 intermediates take a few hundred MB, whatever the vocabulary.
LOGITS_AT_ONCE = 1 << 24


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype, or fp32 if that is finer."""
    return torch.promote_types(dtype, torch.float32)


def rows_at_once(width: int, limit: int = LOGITS_AT_ONCE) -> int:
    """How many rows of `width` numbers make a piece of at most `limit` numbers; at least one."""
    return max(1, limit // width)


def kl_divergence(
    logits: Float[Tensor, "*tokens vocabulary"],
    target: Float[Tensor, "*tokens vocabulary"],
    temperature: float = 1.0,
    *,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> Float[Tensor, ""]:
    """`T^2 KL(softmax(target / T) || softmax(logits / T))` in nats, summed over the tokens, in fp32 or better.

    Computed in pieces, and again in the backward pass, so that no fp32 copy of all logits is ever held. The factor
    `T^2` keeps gradients of different temperatures comparable (Hinton et al., 1503.02531, section 2).
    """
    rows = rows_at_once(logits.shape[-1], logits_at_once)
    total = torch.zeros((), dtype=precise(logits.dtype), device=logits.device)
    for part in zip(logits.flatten(0, -2).split(rows), target.flatten(0, -2).split(rows), strict=True):
        total = total + checkpoint(_kl_piece, *part, temperature, use_reentrant=False, preserve_rng_state=False)
    return total


def _kl_piece(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    dtype = precise(logits.dtype)
    log_q = (logits.to(dtype) / temperature).log_softmax(-1)
    log_p = (target.to(dtype) / temperature).log_softmax(-1)
    return temperature**2 * functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
