"""Plain data and windows in the cache of tensors: data is kept as the bytes of its JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

from bs_exp.cache import Cache, Entry
from bs_exp.types import Feeding, TokenWindows

# Kinds of entries: dense metrics, windows of calibrations and of evaluations. None makes a compression cheaper.
EVALUATION, TOKENISATION, EVALUATED = "dense_evaluation", "tokenisation", "evaluated_windows"
NOT_OF_COMPRESSION = frozenset({EVALUATION, TOKENISATION, EVALUATED})
_DATA, _IDS, _TAIL = "data", "ids", "tail"


def find_data(cache: Cache, kind: str, key: str) -> Any:
    """The plain data under a key, or None."""
    entry = cache.find(kind, key)
    return None if entry is None else _data(entry)


def store_data(cache: Cache, kind: str, key: str, data: Any) -> None:
    """Stores data that JSON can hold."""
    cache.store(kind, key, {_DATA: _bytes(data)})


def find_windows(cache: Cache, kind: str, key: str) -> TokenWindows | None:
    """The windows under a key, or None."""
    entry = cache.find(kind, key)
    if entry is None:
        return None
    data = _data(entry)
    tail = entry.tensor(_TAIL) if data["has_tail"] else None
    return TokenWindows(
        ids=entry.tensor(_IDS), provenance=data["provenance"], tail=tail, feeding=Feeding(**data["feeding"])
    )


def store_windows(cache: Cache, kind: str, key: str, windows: TokenWindows) -> None:
    """Stores windows with their provenance."""
    tail = {} if windows.tail is None else {_TAIL: windows.tail}
    data = {"provenance": dict(windows.provenance), "feeding": asdict(windows.feeding), "has_tail": bool(tail)}
    cache.store(kind, key, {_IDS: windows.ids, **tail, _DATA: _bytes(data)})


def _bytes(data: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(data).encode()), dtype=torch.uint8)


def _data(entry: Entry) -> Any:
    return json.loads(entry.tensor(_DATA).numpy().tobytes())
