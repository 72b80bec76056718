"""A checkpoint whose weights stay in their safetensors files: the model's parameters are views of these.

Transformers maps names, ties weights and reports what is missing as always; it is handed the views as a state dict.
Its own way, hooks of accelerate that put weights in place of parameters on the meta device for each call, was tried: a
parameter would be another object in every call, which neither twins that share it nor hooks on its gradient survive.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, cached_files

from bs_exp.errors import ModelError
from bs_exp.models.auto_classes import AutoClass
from bs_exp.models.mapped import StoredTensor, is_mapped, map_tensors, read_header

if TYPE_CHECKING:
    from bs_exp.models.checkpoint import Checkpoint


def read_in_place(
    checkpoint: Checkpoint, config: PreTrainedConfig, auto: AutoClass, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, whose matrices lie in the checkpoint's files, and what Transformers tells of loading it.

    No weight is read. ModelError if the weights are no safetensors or of another dtype than is asked for, if a shard
    is missing, if the index does not fit its shards, or if the model holds weights in another form than the files.
    """
    stored = _stored(checkpoint)
    _require_dtype(checkpoint, stored, config)
    with torch.device("meta"):
        empty = auto.loader.from_config(config, trust_remote_code=checkpoint.trust_remote_code)
    module: PreTrainedModel
    module, info = type(empty).from_pretrained(
        None,
        config=config,
        state_dict=map_tensors(stored),
        dtype=checkpoint.dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    if not (info["missing_keys"] or info["mismatched_keys"]):  # else the checkpoint is refused for these
        _require_in_place(checkpoint, module)
    if module.can_generate():
        with suppress(OSError):  # a checkpoint need not have one
            module.generation_config = GenerationConfig.from_pretrained(
                checkpoint.place, revision=checkpoint.revision or "main"
            )
    return module, info


def _stored(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The tensors of all files of a checkpoint, by name."""
    if single := _found(checkpoint, SAFE_WEIGHTS_NAME):
        return read_header(single)
    index_file = _found(checkpoint, SAFE_WEIGHTS_INDEX_NAME)
    if index_file is None:
        raise ModelError(
            f"{checkpoint.place} holds no safetensors ({SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}), which "
            "model.offload=disk uses in place. Load it once with Transformers and save it anew (save_pretrained), or "
            "set model.offload=none."
        )
    names = sorted(set(_weight_map(index_file).values()))
    stored, wrong_size = _read_index(index_file, _shards(checkpoint, names), checkpoint.hint)
    if wrong_size is not None:
        raise ModelError(
            f"The index of {checkpoint.place} does not fit its shards: {wrong_size} Files were exchanged or cut: get "
            "the checkpoint again; if it is right, correct that number."
        )
    return stored


def check_shards(folder: Path, hint: str) -> str | None:
    """What is odd about the sizes that the index of a folder declares; None if nothing is, or it has no index.

    ModelError if a shard is missing, or lacks a weight that it should hold: before any weight is read.
    """
    index_file = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file() or not index_file.is_file():
        return None
    names = sorted(set(_weight_map(index_file).values()))
    return _read_index(index_file, _in_folder(folder, names, hint), hint, more=True)[1]


def _read_index(
    index_file: Path, files: Mapping[str, Path], hint: str, *, more: bool = False
) -> tuple[dict[str, StoredTensor], str | None]:
    """The tensors of all shards by name, and what is wrong about the size that the index declares, if anything is.

    ModelError for a shard that lacks a weight, and, unless there may be `more`, for one that is not in the index.
    """
    weight_map = _weight_map(index_file)
    stored: dict[str, StoredTensor] = {}
    for name, file in files.items():
        header = read_header(file)
        declared = {tensor for tensor, shard in weight_map.items() if shard == name}
        if wrong := sorted(declared - header.keys() if more else declared ^ header.keys()):
            where = "lacks it" if wrong[0] in declared else "holds it"
            raise ModelError(
                f"The index of {index_file.parent} does not fit its shards: {len(wrong)} weights, such as {wrong[0]}, "
                f"are not where {index_file.name} says; {name} {where}. {hint}"
            )
        stored |= header
    found = sum(tensor.nbytes for tensor in stored.values())
    declared_size = (json.loads(index_file.read_text(encoding="utf-8")).get("metadata") or {}).get("total_size")
    if declared_size is None or declared_size == found:
        return stored, None
    return stored, (
        f"{index_file.name} says that they hold {declared_size:,} bytes (metadata.total_size), they hold {found:,}."
    )


def _weight_map(index_file: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
    return found


def _found(checkpoint: Checkpoint, name: str) -> Path | None:
    file = cached_file(
        checkpoint.place, name, revision=checkpoint.revision, _raise_exceptions_for_missing_entries=False
    )
    return None if file is None else Path(file)


def _shards(checkpoint: Checkpoint, names: list[str]) -> dict[str, Path]:
    if Path(checkpoint.place).is_dir():
        return _in_folder(Path(checkpoint.place), names, checkpoint.hint)
    found = cached_files(checkpoint.place, names, revision=checkpoint.revision)
    assert found is not None  # what is missing raises
    return {Path(file).name: Path(file) for file in found}


def _in_folder(folder: Path, names: list[str], hint: str) -> dict[str, Path]:
    files = {name: Path(folder, name) for name in names}
    if absent := [name for name, file in files.items() if not file.is_file()]:
        raise ModelError(
            f"{folder} lacks {len(absent)} of {len(names)} shards that its index names: {', '.join(absent[:5])}. {hint}"
        )
    return files


def _require_dtype(checkpoint: Checkpoint, stored: Mapping[str, StoredTensor], config: PreTrainedConfig) -> None:
    """ModelError unless most of the weights have the dtype that is asked for: to convert them is to copy them."""
    sizes: Counter[torch.dtype | None] = Counter()
    for tensor in stored.values():
        sizes[tensor.dtype] += tensor.nbytes
    if not sizes or None in sizes:
        raise ModelError(f"{checkpoint.place} holds no weights in a dtype of torch. {checkpoint.hint}")
    [(found, _)] = sizes.most_common(1)
    wanted = checkpoint.dtype if isinstance(checkpoint.dtype, torch.dtype) else getattr(config, "dtype", None)
    if wanted not in (None, found):
        raise ModelError(
            f"{checkpoint.place} stores its weights as {found}, asked for is {wanted} (model.dtype, or with auto the "
            "dtype of config.json): model.offload=disk uses the files as they are. Set model.dtype to "
            f"{str(found).removeprefix('torch.')}, or model.offload=none."
        )


def _require_in_place(checkpoint: Checkpoint, module: nn.Module) -> None:
    copied = [name for name, weight in module.named_parameters() if weight.ndim > 1 and not is_mapped(weight)]
    if copied:
        raise ModelError(
            f"{type(module).__name__} holds {len(copied)} weights of {checkpoint.place} in another form than its files "
            f"do, such as {copied[0]}, so they cannot be used in place. Set model.offload=none, or save the model anew "
            "in its present form (save_pretrained with save_original_format=False)."
        )
