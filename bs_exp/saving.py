"""Saving: a model folder that plain Transformers loads, written under a temporary name and renamed."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bs_exp import hf_plugin
from bs_exp.errors import ConfigError, SaveError
from bs_exp.replacement import is_factorised

_CONFIG = "config.json"


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> Path:
    """The folder, holding model and tokenizer whole or not at all; a model saved there before is replaced.

    `from_pretrained` loads a compressed model after `import bs_exp`, and with `trust_remote_code=True` anywhere: a copy
    of the plug-in lies in the folder. A dense model becomes an ordinary checkpoint.
    """
    folder = Path(folder).absolute()
    _check_replaceable(folder)
    try:
        _write(model, tokenizer, folder)
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"Cannot write the model to {folder}: {error}. Nothing half-written is left. "
            "Free some space, or name another folder (hydra.run.dir=DIR)."
        ) from error
    return folder


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: a rename must not cross file systems.
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True
    ) as scratch:
        written = Path(scratch, "new")
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        _add_remote_code(model, written)
        if folder.exists():
            folder.rename(Path(scratch, "old"))
        written.rename(folder)


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and ((folder / _CONFIG).exists() or not any(folder.iterdir()))):
        raise ConfigError(
            f"{folder} exists and is no model folder, so it is not overwritten. Name another folder or remove it."
        )


def _add_remote_code(model: PreTrainedModel, folder: Path) -> None:
    """The plug-in's own source beside a compressed model, and the entries through which Auto classes find it."""
    # A model of custom code brings its own auto_map, which must stay.
    if not is_factorised(model) or model.is_remote_code():
        return
    shutil.copyfile(hf_plugin.__file__, folder / f"{hf_plugin.REMOTE_MODULE}.py")
    path = folder / _CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = hf_plugin.AUTO_MAP
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
