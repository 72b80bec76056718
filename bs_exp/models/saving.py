"""Saving: a model folder that plain Transformers loads, written under a temporary name and renamed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from bs_exp.errors import ConfigError, SaveError
from bs_exp.files import remove_scratch, scratch_prefix
from bs_exp.models.adapters import has_adapters, save_adapters, without_adapters
from bs_exp.models.mapped import release
from bs_exp.models.modeling_basis_sharing import complete_config
from bs_exp.models.offload import lies_in_files
from bs_exp.models.processor_files import copy_missing
from bs_exp.models.surgery import is_factorised

_CONFIG = "config.json"
# Of a model that is not in memory.
_SHARD = "512MB"
# Adapters are in a folder of their own: beside config.json, `from_pretrained` would look for the base model of them.
ADAPTER_FOLDER = "adapter"


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | str,
    *,
    files: Mapping[str, Path] | None = None,
    source: Path | None = None,
) -> Path:
    """Writes model and tokenizer into `folder`, whole or not at all, and returns its absolute path.

    A model that was saved there before is replaced. `from_pretrained` loads a compressed model where bs_exp is
    installed, and with `trust_remote_code=True` anywhere, since the folder holds a copy of the modeling file. A dense
    model becomes an ordinary checkpoint. `files`, by their names in the folder, are copied beside what is written: such
    as those of the processors of the checkpoint that the model was made from. Raises ConfigError if the folder holds
    something other than a model, or is `source`, the checkpoint that the model was made from; SaveError if it cannot be
    written.
    """
    folder = Path(folder).absolute()
    check_replaceable(folder, source)
    try:
        _write(model, tokenizer, folder, files or {})
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"Cannot write the model to {folder}: {error}. Nothing half-written is left. "
            "Free some space, or name another folder (hydra.run.dir=DIR)."
        ) from error
    return folder


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, files: Mapping[str, Path]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_scratch(folder)
    # Beside the target: a rename must not cross file systems.
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=scratch_prefix(folder), ignore_cleanup_errors=True
    ) as scratch:
        written = Path(scratch, "new")
        _write_weights(without_adapters(model), written)
        tokenizer.save_pretrained(written)
        copy_missing(files, written)
        if has_adapters(model):
            save_adapters(model, written / ADAPTER_FOLDER)
        _follow_umask(written)
        if folder.exists():
            folder.rename(Path(scratch, "old"))
        written.rename(folder)


def _write_weights(model: PreTrainedModel, folder: Path) -> None:
    """Configuration and weights. Of a model that lies in files, one shard is in memory at a time."""
    if not lies_in_files(model):
        model.save_pretrained(folder)
        return
    model.save_pretrained(folder, state_dict={})
    state = remove_tied_weights_from_state_dict(model.state_dict(), model)
    state = revert_weight_conversion(model, state)
    split = split_torch_state_dict_into_shards(
        state, filename_pattern=SAFE_WEIGHTS_NAME.replace(".", "{suffix}."), max_shard_size=_SHARD
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: state[name].contiguous() for name in names}, folder / file, {"format": "pt"})
        release(state[name] for name in names)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    if is_factorised(model):
        complete_config(folder)


def check_replaceable(folder: Path, source: Path | None = None) -> None:
    """ConfigError if `folder` exists and is neither a model folder nor empty, or is that of the `source` model."""
    if source is not None and folder.exists() and folder.samefile(source):
        raise ConfigError(
            f"{folder} holds the model that is compressed, and is not overwritten. Name another folder "
            "(hydra.run.dir=DIR)."
        )
    if folder.exists() and not (folder.is_dir() and ((folder / _CONFIG).exists() or not any(folder.iterdir()))):
        raise ConfigError(
            f"{folder} exists and is no model folder, so it is not overwritten. Name another folder or remove it."
        )


def _follow_umask(folder: Path) -> None:
    """Gives every file the mode that the umask asks for; safetensors lets only the owner read its files."""
    mode = (folder / _CONFIG).stat().st_mode
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)
