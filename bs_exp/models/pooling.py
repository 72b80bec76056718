"""Sentence embeddings: the hidden states of a text made into one vector, as sentence-transformers does it."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from bs_exp.types import Pooling, PoolingMode


def pooled(
    hidden: Float[Tensor, "texts positions d"], mask: Int[Tensor, "texts positions"] | None, pooling: Pooling
) -> Float[Tensor, "texts modes*d"]:
    """The embedding of every text, in the dtype of the hidden states. `mask` is 0 at padding; None: there is none.

    The arithmetic of `sentence_transformers.models.Pooling` and `Normalize` (Reimers and Gurevych, 1908.10084).
    """
    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    parts = [_vector(hidden, mask, mode) for mode in pooling.modes]
    found = torch.cat(parts, dim=-1)
    return functional.normalize(found, dim=-1) if pooling.normalize else found


def _vector(hidden: Tensor, mask: Tensor, mode: PoolingMode) -> Tensor:
    shares = mask.unsqueeze(-1).to(hidden.dtype)
    rows = torch.arange(len(hidden), device=hidden.device)
    match mode:
        case "cls":  # the first token that is no padding: tokenizers may pad on the left
            return hidden[rows, mask.argmax(1)]
        case "lasttoken":
            return hidden[rows, hidden.shape[1] - 1 - mask.flip(1).argmax(1)]
        case "max":
            return hidden.masked_fill(shares == 0.0, float("-inf")).amax(1)
        case "mean":
            return (hidden * shares).sum(1) / shares.sum(1).clamp_min(1e-9)
        case "mean_sqrt_len_tokens":
            return (hidden * shares).sum(1) / shares.sum(1).clamp_min(1e-9).sqrt()
        case "weightedmean":  # SGPT: later tokens, which have read more, weigh more; counted behind padding on the left
            weights = shares * mask.cumsum(1).unsqueeze(-1)
            return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1e-9)
