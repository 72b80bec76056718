"""Embeddings of texts by a model, pooled as a sentence-transformers model says, else the mean over tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from bs_exp.models.model_inputs import Inputs, hidden_states
from bs_exp.models.pooling import pooled
from bs_exp.types import LoadedModel, Pooling, Task

# Of a model that does not say how it pools.
_MEAN = Pooling(modes=("mean",))


def token_rows(texts: Sequence[str], model: LoadedModel, *, length: int) -> list[list[int]]:
    """Token ids of every text, with the special tokens of the tokenizer, cut at `length` tokens.

    A text without a token is one token that ends a text, or that stands for none.
    """
    if not texts:
        return []
    tokenizer = model.tokenizer
    rows: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
    nothing = next((i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None), 0)
    return [row or [nothing] for row in rows]


def embeddings_of(rows: Sequence[Sequence[int]], model: LoadedModel) -> Float[Tensor, "texts d"]:
    """Embeddings of texts that are read in one batch: of length 1, in fp64 on the CPU."""
    inputs = _padded(rows, model)
    with torch.inference_mode():
        hidden = hidden_states(model.module, inputs)
        found = pooled(hidden, inputs["attention_mask"], model.pooling or _MEAN)
    return functional.normalize(found.double().cpu(), dim=-1)


def _padded(rows: Sequence[Sequence[int]], model: LoadedModel) -> Inputs:
    """Inputs of a batch, padded on the right."""
    length, pad = max(map(len, rows)), model.tokenizer.pad_token_id or 0
    ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    inputs: dict[str, object] = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    return {**inputs, "use_cache": False} if model.task is Task.CAUSAL_LM else inputs
