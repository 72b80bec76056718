"""How far predictions are from others, in pieces that fit into memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers per piece of a comparison: its fp32 intermediates take a few hundred MB, whatever the vocabulary.
LOGITS_AT_ONCE = 1 << 24
# On a CPU intermediates that stay in its caches take a third of the time.
_IN_CACHE = 1 << 19


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
    tokens: Int[Tensor, " chosen"] | None = None,
    logits_at_once: int | None = None,
) -> Float[Tensor, ""]:
    """`T^2 KL(softmax(target / T) || softmax(logits / T))` in nats, summed over the tokens, in fp32 or better.

    `tokens` are those that count, each once, by their place among all (None: all). Computed in pieces, together with
    the gradient by `logits` where that is wanted, so that no fp32 copy of all logits is ever held; `target` gets none.
    The factor `T^2` keeps gradients of different temperatures comparable (Hinton et al., 1503.02531, section 2).
    """
    if logits_at_once is None:
        logits_at_once = _IN_CACHE if logits.device.type == "cpu" else LOGITS_AT_ONCE
    if logits.shape != target.shape:
        raise ValueError(f"Logits {tuple(logits.shape)} cannot be compared with {tuple(target.shape)}.")
    rows = rows_at_once(logits.shape[-1], logits_at_once)
    flat = logits.flatten(0, -2), target.detach().flatten(0, -2)
    pieces: Sequence[Tensor | slice] = (
        [slice(start, start + rows) for start in range(0, len(flat[0]), rows)] if tokens is None else tokens.split(rows)
    )
    found: Tensor = _Divergence.apply(*flat, temperature, pieces)  # type: ignore[no-untyped-call]
    return found


class _Divergence(torch.autograd.Function):
    """The gradient, `T (softmax(logits / T) - softmax(target / T))`, comes out of what the value is made of.

    It waits in the dtype of the logits: in fp16, where most of it would be zero, as a multiple by a power of two.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, temperature: float, pieces: Sequence[Tensor | slice]
    ) -> Tensor:
        dtype = precise(logits.dtype)
        ctx.times = 2.0 ** (15 - math.ceil(math.log2(max(temperature, 1.0)))) if logits.dtype == torch.float16 else 1.0
        gradient = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=dtype, device=logits.device)
        for piece in pieces:
            log_q, log_p = ((x[piece].to(dtype) / temperature).log_softmax(-1) for x in (logits, target))
            p = log_p.exp()
            total += log_p.sub_(log_q).mul_(p).sum()
            if gradient is not None:
                gradient[piece] = log_q.exp_().sub_(p).mul_(temperature * ctx.times).to(logits.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total.mul_(temperature**2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        found = torch.empty_like(gradient)
        rows = rows_at_once(gradient.shape[-1])
        for part, kept in zip(found.split(rows), gradient.split(rows), strict=True):
            part.copy_(kept.to(upstream.dtype) * (upstream / ctx.times))
        return found, None, None, None
