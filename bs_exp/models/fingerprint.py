"""The identity of a model: one hash over its weights and configuration, so that no cache can confuse two models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bs_exp.errors import ModelError
from bs_exp.models.mapped import release
from bs_exp.types import LoadedModel

_FORMAT = b"bs_exp model fingerprint 1"
_CHUNK = 1 << 24  # elements: a model of 7B parameters is never copied as a whole

# Settings that say where a model is stored and what wrote it, but do not change what it computes.
_VOLATILE = ("_name_or_path", "transformers_version", "_commit_hash", "architectures", "auto_map")


def as_loaded(module: PreTrainedModel, dense: LoadedModel) -> LoadedModel:
    """A model made from `dense`, as it is now, for gathering statistics: known by its own fingerprint."""
    return replace(dense, module=module, provenance={**dense.provenance, "fingerprint": fingerprint(module)})


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256, in hex, over name, dtype, shape and bytes of all parameters and saved buffers, and the configuration.

    Tied weights are hashed once, under their first name. Raises ModelError for a weight that holds NaN or infinity:
    every tensor is read here anyway, and no later stage can work with such a weight.
    """
    digest = hashlib.sha256(_FORMAT)
    config = {key: value for key, value in model.config.to_dict().items() if key not in _VOLATILE}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in sorted(model.state_dict().items()):
        storage = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if owner := seen.get(storage) if tensor.numel() else None:
            digest.update(f"{name} = {owner}\n".encode())
            continue
        seen[storage] = name
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.is_meta:
            raise ModelError(f"{name} has a shape and no values (it is on the meta device): load the model's weights.")
        for chunk in _chunks(tensor.detach()):
            if not bool(torch.isfinite(chunk).all()):
                raise ModelError(_not_finite(name, tensor))
            digest.update(chunk.view(torch.uint8).cpu().numpy().data)
        release([tensor])
    return digest.hexdigest()


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        yield flat[start : start + _CHUNK]


def _not_finite(name: str, tensor: Tensor) -> str:
    bad = int((~torch.isfinite(tensor)).sum())
    return (
        f"Weight {name} of shape {tuple(tensor.shape)} ({tensor.dtype}) holds {bad} values that are NaN or infinite. "
        "The checkpoint is damaged, or its values do not fit this dtype; get it again, or try model.dtype=float32."
    )
