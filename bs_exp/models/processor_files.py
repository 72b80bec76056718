"""Files of a checkpoint beside weights and configuration: those of its tokenizer, its processors, and its modules."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transformers.utils import AUDIO_TOKENIZER_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME
from transformers.utils.hub import (
    CHAT_TEMPLATE_DIR,
    CHAT_TEMPLATE_FILE,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    cached_file,
)

from bs_exp.models.sentence_transformers import ReadFile, read_sentence_model

# What a processor is read from on the hub, where a listing would need the network.
_HUB_NAMES = (
    *(PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, AUDIO_TOKENIZER_NAME),
    *(CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, "tokenizer.model"),
)
_PATTERNS = (
    *("*processor*.json", "*tokenizer*", "chat_template*", f"{CHAT_TEMPLATE_DIR}/*"),
    *("special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "tekken.json", "*.model", "*.spm"),
)
# No weights, and no code.
_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".spm", ".tiktoken", ".bpe"})


def loaded_from(provenance: Mapping[str, Any]) -> Path | None:
    """The folder of a loaded model's checkpoint; None for one of the hub, or in memory."""
    folder = Path(str(provenance["name"])) if provenance["source"] == "local" else None
    return folder if folder is not None and folder.exists() else None


def processor_files(provenance: Mapping[str, Any]) -> dict[str, Path]:
    """Files of the tokenizer and the processors of a loaded model's checkpoint, by their names inside it; with them
    those by which it is a sentence-transformers model.

    `provenance` is that of a `LoadedModel`. Empty for a model of no checkpoint. Of a hub checkpoint the usual files of
    processors, as far as they can be had; that none can be had is no error.
    """
    place, source = str(provenance["name"]), provenance["source"]
    if source == "local":
        return copied_files(Path(place))
    if source != "hub":
        return {}
    find = file_finder("hub", place, provenance.get("revision"))
    found = {name: find(name) for name in _HUB_NAMES}
    return {name: path for name, path in found.items() if path is not None} | _of_modules(find, place)


def file_finder(source: str, place: str, revision: str | None) -> ReadFile:
    """What gives the local path of a checkpoint's file by its name there, None where there is none."""

    def find(name: str) -> Path | None:
        if source == "hub":
            return _from_hub(place, name, revision)
        path = Path(place, name)
        return path if source == "local" and path.is_file() else None

    return find


def copy_missing(files: Mapping[str, Path], folder: Path) -> None:
    """Copies files into a folder, under their names, except those that are there already."""
    for name, path in files.items():
        target = folder / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def copied_files(folder: Path) -> dict[str, Path]:
    """Files of the tokenizer, the processors and sentence-transformers' modules in a folder, by their names there."""
    names = {
        str(path.relative_to(folder)): path
        for pattern in ("*", f"{CHAT_TEMPLATE_DIR}/*")
        for path in folder.glob(pattern)
    }
    found = {name: path for name, path in sorted(names.items()) if _is_wanted(name) and path.is_file()}
    return found | _of_modules(file_finder("local", str(folder), None), str(folder))


def _of_modules(find: ReadFile, place: str) -> dict[str, Path]:
    sentence = read_sentence_model(find, place)
    return {} if sentence is None else dict(sentence.files)


def _is_wanted(name: str) -> bool:
    return Path(name).suffix in _SUFFIXES and any(fnmatchcase(name, pattern) for pattern in _PATTERNS)


def _from_hub(place: str, name: str, revision: str | None) -> Path | None:
    found = cached_file(
        place,
        name,
        revision=revision or "main",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)
