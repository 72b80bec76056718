"""Computed tensors on disk, under keys of all that they depend on, so that nothing is computed twice.

A stale hit is impossible: the key is a hash of everything the tensors depend on, and the file repeats it. A truncated
or damaged file is never used: files appear whole (`bs_exp.files`), and their content, with the names, dtypes and shapes
of the tensors, is compared with what was stored when a process first opens them.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bs_exp.cache_folder import SUFFIX, Lease, prune, remove
from bs_exp.errors import CacheError, ConfigError
from bs_exp.files import remove_leftovers, replacing

FORMAT_VERSION = 8
# Entries of a file's metadata that are no checksum of a tensor. Files of earlier versions lack all but the first.
_KEY, _DECLARED, _MODEL = "key", "declared", "_model"
DTYPES = ("auto", "float64", "float32")
# `auto` stores numbers in fp64 up to so many bytes of one kind (Grams, factors) and model.
_AFFORDABLE = 4 * 2**30
# Rounds that take more are not kept, unless asked.
_SMALL_ROUND = 2**30
_Read = TypeVar("_Read")
_Header = tuple[str, str, list[int]]  # name, dtype, shape


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

    def length(self, name: str) -> int:
        """The number of rows of a tensor."""


@dataclass(frozen=True, eq=False)
class MemoryEntry:
    """Tensors in the memory of this process."""

    tensors: Mapping[str, Tensor]

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def rows(self, name: str, stop: int) -> Tensor:
        return self.tensors[name][:stop]

    def length(self, name: str) -> int:
        return len(self.tensors[name])


@dataclass(frozen=True)
class FileEntry:
    """Tensors in a file, read anew at every call; CacheError if the file is no longer what it was."""

    path: Path

    def tensor(self, name: str) -> Tensor:
        found: Tensor = self._read(lambda file: file.get_tensor(name))
        return found

    def rows(self, name: str, stop: int) -> Tensor:
        found: Tensor = self._read(lambda file: file.get_slice(name)[:stop])
        return found

    def length(self, name: str) -> int:
        return self._read(lambda file: int(file.get_slice(name).get_shape()[0]))

    def _read(self, read: Callable[[Any], _Read]) -> _Read:
        try:
            with safe_open(self.path, framework="pt") as file:
                return read(file)
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"The cache file {self.path} was there when this run began and cannot be read any more: {error}. "
                "Something removed or changed it meanwhile. Start the run again, which computes what is missing; give "
                "it a folder of its own with cache.dir=DIR if another program clears this one."
            ) from error


@dataclass
class Cache:
    """Content-keyed tensors under `folder`; without a folder they live in memory, as long as this object.

    `hits`, `misses` and `damaged` count look-ups by kind (such as "gram" and "decomposition"). `dtype` is that of
    Grams and factors (`stored_dtype`). With `max_gb` the folder is kept below so many GiB: what no living process uses
    goes, the longest unused first; `over` are the bytes above it that are in use. `keep_rounds` is for `drop`.
    `model` is what files say they were computed from, for people.
    Raises ConfigError for settings that make no sense.
    """

    folder: Path | None
    model: str = "-"
    dtype: str = "auto"
    max_gb: float | None = None
    keep_rounds: bool | str = "auto"
    hits: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)
    damaged: Counter[str] = field(default_factory=Counter)
    over: int = 0
    made: list[str] = field(default_factory=list)
    _memory: dict[tuple[str, str], MemoryEntry] = field(default_factory=dict)
    _verified: set[Path] = field(default_factory=set)
    _lease: Lease | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"cache.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.keep_rounds not in (True, False, "auto"):
            raise ConfigError(f"cache.keep_rounds must be auto, true or false, got {self.keep_rounds!r}.")
        if self.max_gb is not None and (isinstance(self.max_gb, bool) or not self.max_gb > 0):
            raise ConfigError(f"cache.max_gb must be above 0, or null for no limit, got {self.max_gb!r}.")

    def stored_dtype(self, numbers: int) -> torch.dtype:
        """The dtype in which so many numbers of one kind and model are stored: `auto` is fp64 up to 4 GiB of them."""
        exact = self.dtype == "float64" or (self.dtype == "auto" and 8 * numbers <= _AFFORDABLE)
        return torch.float64 if exact else torch.float32

    def check(self) -> None:
        """CacheError if the folder does not exist and cannot be made; called before any work.

        Removes what processes that were killed a day ago or earlier left half-written there.

        A folder that exists but is read-only passes, since it may hold all that is needed.
        """
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        for folder in self.folder.glob("*"):
            if folder.is_dir() and not folder.is_symlink():
                remove_leftovers(folder)

    def find(self, kind: str, key: str) -> Entry | None:
        """The entry under a key, or None. A damaged file counts as absent, and is overwritten by the next `store`."""
        if self.folder is not None:
            self._use(f"{kind}/{key}")
        entry = self._memory.get((kind, key)) if self.folder is None else self._open(kind, key)
        (self.misses if entry is None else self.hits)[kind] += 1
        return entry

    def holds(self, kind: str, key: str) -> bool:
        """Whether there is an entry under a key; it is neither read nor counted."""
        return (kind, key) in self._memory if self.folder is None else self._path(kind, key).is_file()

    def look_again(self, kind: str, key: str) -> Entry:
        """The entry that another process of this run stored; it is no find. CacheError if it is not here."""
        entry = None if self.folder is None else self._open(kind, key)
        if entry is None:
            raise CacheError(
                f"{self.folder} is not the folder that the other processes of this run write to. They hand each other "
                "statistics and factors through the cache: set cache.dir to a folder that all machines share."
            )
        self._use(f"{kind}/{key}")
        return entry

    def store(self, kind: str, key: str, tensors: Mapping[str, Tensor]) -> Entry:
        """Stores the tensors under a key, and returns their entry.

        Raises CacheError if the folder cannot be written; no partly written file stays behind.
        """
        self.made.append(f"{kind}/{key}")
        if self.folder is None:
            self._memory[kind, key] = MemoryEntry(dict(tensors))
            return self._memory[kind, key]
        path = self._path(kind, key)
        self._use(f"{kind}/{key}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            checksums = {name: _checksum(tensor) for name, tensor in stored.items()}
            with replacing(path) as temporary:
                declared = json.dumps([_header(name, tensor) for name, tensor in sorted(stored.items())])
                save_file(stored, temporary, {_KEY: key, _DECLARED: declared, _MODEL: self.model, **checksums})
            if self.max_gb is not None:
                most = int(self.max_gb * 2**30)
                self.over = max(0, prune(self.folder, most)[1] - most)
        except (OSError, SafetensorError) as error:
            raise _unwritable(path, error) from error
        return FileEntry(path)

    def drop(self, names: Collection[str]) -> None:
        """Removes the entries (KIND/KEY, as in `made`) of a round that has ended, but for those that others use.

        Nothing goes if rounds are kept; `keep_rounds="auto"` keeps those of up to 1 GiB.
        """
        if not self.keeps(self._bytes(names)):
            self.discard(names)

    def discard(self, names: Collection[str]) -> None:
        """Removes entries (KIND/KEY) that nobody will ask for again, but for those that others use."""
        if self.folder is None:
            for name in names:
                kind, _, key = name.partition("/")
                self._memory.pop((kind, key), None)
        else:
            remove(self.folder, names, lease=self._lease)

    def keeps(self, nbytes: int) -> bool:
        """Whether a round of so many bytes is kept when it has ended."""
        return self.keep_rounds is True or (self.keep_rounds == "auto" and nbytes <= _SMALL_ROUND)

    def made_bytes(self) -> dict[str, int]:
        """Bytes, by kind, of what this process stored and is still there."""
        found: Counter[str] = Counter()
        for name in set(self.made):
            found[name.partition("/")[0]] += self._bytes([name])
        return dict(found)

    def release(self) -> None:
        """Says that nothing that was found or stored is needed any more, so that others may remove it."""
        if self._lease is not None:
            self._lease.close()
            self._lease = None

    def _use(self, name: str) -> None:
        """Keeps others from removing an entry; without effect in a folder that cannot be written."""
        assert self.folder is not None
        try:
            self._lease = self._lease or Lease(self.folder)
            self._lease.add(name)
        except OSError:  # read-only, or full: what is there can still be read, and `store` says what is wrong
            return

    def _bytes(self, names: Collection[str]) -> int:
        total = 0
        for name in set(names):
            kind, _, key = name.partition("/")
            if self.folder is None:
                held = self._memory.get((kind, key))
                total += sum(tensor.nbytes for tensor in held.tensors.values()) if held else 0
            else:
                with suppress(FileNotFoundError):
                    total += self._path(kind, key).stat().st_size
        return total

    def _path(self, kind: str, key: str) -> Path:
        assert self.folder is not None
        return self.folder / kind / f"{key}{SUFFIX}"

    def _open(self, kind: str, key: str) -> FileEntry | None:
        path = self._path(kind, key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                intact = metadata.get(_KEY) == key
                if intact and path not in self._verified:
                    intact = _is_intact(file, metadata)
        except (OSError, SafetensorError):
            intact = False
        if not intact:
            self.damaged[kind] += 1
            return None
        self._verified.add(path)
        with suppress(OSError):  # the time of its last use; in a read-only folder it stays
            os.utime(path)
        return FileEntry(path)


def _is_intact(file: Any, metadata: Mapping[str, str]) -> bool:
    """Whether an open file holds the tensors that were stored: no other names, dtypes, shapes or bytes."""
    names = sorted(file.keys())
    if metadata.keys() - {_KEY, _DECLARED, _MODEL} != set(names):
        return False
    headers: list[_Header] = []
    for name in names:  # one tensor in memory at a time
        tensor = file.get_tensor(name)
        if _checksum(tensor) != metadata[name]:
            return False
        headers.append(_header(name, tensor))
    return metadata.get(_DECLARED, declared := json.dumps(headers)) == declared


def _header(name: str, tensor: Tensor) -> _Header:
    return name, str(tensor.dtype), list(tensor.shape)


def _checksum(tensor: Tensor) -> str:
    """CRC-32 of the bytes, in hex: it detects damage by disks and power cuts, not intended changes."""
    return f"{zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data):08x}"


def _unwritable(path: Path, error: Exception) -> CacheError:
    return CacheError(
        f"Cannot write into the cache, {path}: {error}. Free some space, point cache.dir elsewhere, or set "
        "cache.dir=null to keep everything in memory."
    )
