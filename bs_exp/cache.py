"""Computed tensors on disk, under keys of all that they depend on, so that nothing is computed twice.

A stale hit is impossible: the key is a hash of everything the tensors depend on, and the file repeats it. A truncated
or damaged file is never used: files appear whole (`bs_exp.files`), and their content is compared with its checksum when
a process first opens them.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bs_exp.errors import CacheError
from bs_exp.files import replacing

FORMAT_VERSION = 6


def content_key(**parts: Any) -> str:
    """SHA-256, in hex, of the parts (data that JSON can hold) and of the format version."""
    text = json.dumps({"format_version": FORMAT_VERSION, **parts}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Entry(Protocol):
    """Cached tensors by name."""

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""

    def rows(self, name: str, stop: int) -> Tensor:
        """The first `stop` rows of a tensor; only these are read from a file."""


@dataclass(frozen=True, eq=False)
class MemoryEntry:
    """Tensors in the memory of this process."""

    tensors: Mapping[str, Tensor]

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def rows(self, name: str, stop: int) -> Tensor:
        return self.tensors[name][:stop]


@dataclass(frozen=True)
class FileEntry:
    """Tensors in a file, read anew at every call."""

    path: Path

    def tensor(self, name: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def rows(self, name: str, stop: int) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_slice(name)[:stop]
        return tensor


@dataclass
class Cache:
    """Content-keyed tensors under `folder`; without a folder they live in memory, as long as this object.

    `hits`, `misses` and `damaged` count look-ups by kind (such as "gram" and "decomposition").
    """

    folder: Path | None
    hits: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)
    damaged: Counter[str] = field(default_factory=Counter)
    _memory: dict[tuple[str, str], MemoryEntry] = field(default_factory=dict)
    _verified: set[Path] = field(default_factory=set)

    def check(self) -> None:
        """CacheError if the folder does not exist and cannot be made; called before any work.

        A folder that exists but is read-only passes, since it may hold all that is needed.
        """
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def find(self, kind: str, key: str) -> Entry | None:
        """The entry under a key, or None. A damaged file counts as absent, and is overwritten by the next `store`."""
        entry = self._memory.get((kind, key)) if self.folder is None else self._open(kind, key)
        (self.misses if entry is None else self.hits)[kind] += 1
        return entry

    def store(self, kind: str, key: str, tensors: Mapping[str, Tensor]) -> Entry:
        """Stores the tensors under a key, and returns their entry.

        Raises CacheError if the folder cannot be written; no partly written file stays behind.
        """
        if self.folder is None:
            return self._memory.setdefault((kind, key), MemoryEntry(dict(tensors)))
        path = self._path(kind, key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            checksums = {name: _checksum(tensor) for name, tensor in stored.items()}
            with replacing(path) as temporary:
                save_file(stored, temporary, {"key": key, **checksums})
        except (OSError, SafetensorError) as error:
            raise _unwritable(path, error) from error
        return FileEntry(path)

    def _path(self, kind: str, key: str) -> Path:
        assert self.folder is not None
        return self.folder / kind / f"{key}.safetensors"

    def _open(self, kind: str, key: str) -> FileEntry | None:
        path = self._path(kind, key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                intact = metadata.get("key") == key
                if intact and path not in self._verified:
                    intact = all(_checksum(file.get_tensor(name)) == metadata.get(name) for name in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError):
            intact = False
        if not intact:
            self.damaged[kind] += 1
            return None
        self._verified.add(path)
        return FileEntry(path)


def _checksum(tensor: Tensor) -> str:
    """CRC-32 of the bytes, in hex: it detects damage by disks and power cuts, not intended changes."""
    return f"{zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data):08x}"


def _unwritable(path: Path, error: Exception) -> CacheError:
    return CacheError(
        f"Cannot write into the cache, {path}: {error}. Free some space, point cache.dir elsewhere, or set "
        "cache.dir=null to keep everything in memory."
    )
