"""The licence of the model that another was made from: copied where there is one, never guessed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from transformers.utils.hub import cached_file
from yaml import YAMLError

_CARD = "README.md"
_FIELDS = ("license", "license_name", "license_link")
_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE", "NOTICE.txt", "USE_POLICY.md")


def licence_lines(provenance: Mapping[str, Any]) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of a loaded model's own card; empty where it says nothing.

    `provenance` is that of a `LoadedModel`. A folder with a licence file and no such line has the licence "other",
    which lies in that file. Without a network, of a hub model only what is in the cache counts.
    """
    card = _found(provenance, _CARD)
    lines = {} if card is None else _lines(card.read_text(encoding="utf-8", errors="replace"))
    files = licence_files(provenance)
    if "license" not in lines and "LICENSE" in files:
        return {"license": "other", "license_link": "LICENSE"}
    return lines if "license" in lines else {}


def licence_files(provenance: Mapping[str, Any]) -> dict[str, Path]:
    """Licence texts beside the model that was loaded, by name."""
    found = {name: _found(provenance, name) for name in _FILES}
    return {name: path for name, path in found.items() if path is not None}


def _lines(card: str) -> dict[str, str]:
    if not REGEX_YAML_BLOCK.search(card):  # the hub's library would warn of it
        return {}
    try:
        data = ModelCard(card, ignore_metadata_errors=True).data
    except (ValueError, YAMLError):  # a card that says nothing, to the hub neither
        return {}
    return {name: data.get(name) for name in _FIELDS if isinstance(data.get(name), str)}


def _found(provenance: Mapping[str, Any], name: str) -> Path | None:
    place, source = str(provenance.get("name", "")), provenance.get("source")
    if source == "local":
        path = Path(place, name)
        return path if path.is_file() else None
    if source != "hub":
        return None
    found = cached_file(
        place,
        name,
        revision=provenance.get("revision") or "main",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)
