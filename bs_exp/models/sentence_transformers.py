"""The files by which a checkpoint is a sentence-transformers model: how it pools, and what is carried to a saved model.

They are a few lines of JSON (`modules.json`, `1_Pooling/config.json`), so the library itself is not needed here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from bs_exp.errors import ModelError
from bs_exp.printable import printable
from bs_exp.types import Pooling, PoolingMode

MODULES = "modules.json"
_OF_THE_MODEL = ("config_sentence_transformers.json", "sentence_bert_config.json")
_TRANSFORMER, _POOLING, _NORMALIZE = "Transformer", "Pooling", "Normalize"
_MODES: Sequence[PoolingMode] = get_args(PoolingMode)
# Older files have a switch for each mode; vectors stand side by side in this order.
_SWITCHES: Mapping[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

ReadFile = Callable[[str], Path | None]
"""The local path of a file of the checkpoint, by its name there; None if it has none."""


@dataclass(frozen=True)
class SentenceModel:
    """What makes a checkpoint a sentence-transformers model.

    `pooling` is None where `others`, modules that are not known here (Dense, ...), take part in its embeddings.
    `files` are those that are copied beside a saved model, by their names in the checkpoint.
    """

    pooling: Pooling | None
    others: tuple[str, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)


def read_sentence_model(find: ReadFile, place: str) -> SentenceModel | None:
    """What the checkpoint's modules.json says; None without one.

    Raises ModelError for files that are no such JSON, and for a transformer in a folder of its own.
    """
    path = find(MODULES)
    if path is None:
        return None
    modules = _json(path, place)
    if not (isinstance(modules, list) and modules and all(_is_module(module) for module in modules)):
        raise ModelError(f"{MODULES} of {place} is no list of modules with a type and a path. {_REMEDY}")
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    if kinds[0] != _TRANSFORMER or modules[0]["path"] != "":
        raise ModelError(
            f"{MODULES} of {place} begins with {printable(kinds[0])} in {printable(repr(modules[0]['path']))}; only a "
            "Transformer in the folder itself can be compressed. Load it with sentence_transformers and save it again, "
            "or name the transformer's folder."
        )
    files = {MODULES: path, **{name: found for name in _OF_THE_MODEL if (found := find(name)) is not None}}
    for module, kind in zip(modules[1:], kinds[1:], strict=True):
        names = ("config.json", *(() if kind in (_POOLING, _NORMALIZE) else ("model.safetensors", "pytorch_model.bin")))
        for name in (f"{module['path']}/{name}" for name in names):
            if (found := find(name)) is not None:
                files[name] = found
    others = tuple(kind for kind in kinds[1:] if kind not in (_POOLING, _NORMALIZE))
    if others or kinds[1:2] != [_POOLING]:
        return SentenceModel(None, others or ("no Pooling",), files)
    name = f"{modules[1]['path']}/config.json"
    if name not in files:
        raise ModelError(f"{place} has a Pooling module, but no {printable(name)}. {_REMEDY}")
    settings = find(_OF_THE_MODEL[1])
    length = None if settings is None else _json(settings, place).get("max_seq_length")
    pooling = Pooling(
        modes=_modes(_json(files[name], place), f"{place}/{name}"),
        normalize=_NORMALIZE in kinds,
        max_length=length if isinstance(length, int) else None,
    )
    return SentenceModel(pooling, (), files)


_REMEDY = "Copy or download the folder again; without modules.json it is read as a plain encoder."


def _is_module(module: Any) -> bool:
    """Whether it names a type and a path inside the folder."""
    if not (isinstance(module, dict) and isinstance(module.get("type"), str) and isinstance(module.get("path"), str)):
        return False
    path = Path(module["path"])
    return not path.is_absolute() and ".." not in path.parts


def _modes(config: Any, name: str) -> tuple[PoolingMode, ...]:
    if isinstance(config, dict):
        said = config.get("pooling_mode")
        chosen = [said] if isinstance(said, str) else said if isinstance(said, list | tuple) else None
        if chosen is None:
            chosen = [mode for switch, mode in _SWITCHES.items() if config.get(switch) is True] or ["mean"]
        if chosen and all(mode in _MODES for mode in chosen):
            return tuple(chosen)
    raise ModelError(f"{printable(name)} names no way of pooling; known are {', '.join(_MODES)}. {_REMEDY}")


def _json(path: Path, place: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {path.name} of {place}: {error}. {_REMEDY}") from error
