"""Tensors that lie in files: views of memory-mapped files, whose pages come into memory when they are read.

Nothing is copied: a page takes memory from its first use until `release`, or until the system needs the memory for
something else, and is then read again from the file when it is used again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import sys
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor, nn

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
# Python names the flag from 3.13 on. Without it, the system wants as much memory and swap as the file is long.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
_ALIGNMENT = 64
# Linux reads no more at one request than a device's read-ahead, 128 KiB if nobody changed it.
_READ_AHEAD = 2**17
# Where a file lies in memory -> its mapping, by start address; a mapping leaves with its last tensor.
_Mapping: TypeAlias = "tuple[int, weakref.ref[mmap.mmap]]"
_mappings: list[_Mapping] = []


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file by its header: None for a dtype that torch has no counterpart of."""

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def can_map() -> bool:
    """Whether this system lets a process give back pages of a file."""
    return hasattr(mmap.mmap, "madvise") and hasattr(mmap, "MADV_DONTNEED")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; no weight is read. SafetensorError or OSError for a damaged file."""
    with safe_open(file, framework="pt"):  # refuses headers that do not fit the file
        pass
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    start = 8 + length
    return {
        name: StoredTensor(
            file,
            _DTYPES.get(entry["dtype"]),
            tuple(entry["shape"]),
            start + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def map_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors as views of their files. What changes in them changes in memory alone, and is lost by `release`."""
    files: dict[Path, mmap.mmap] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        assert tensor.dtype is not None
        if tensor.file not in files:
            with tensor.file.open("rb") as opened:
                files[tensor.file] = _map(opened.fileno(), tensor.file.stat().st_size, shared=False)
        found[name] = _view(files[tensor.file], tensor.dtype, tensor.shape, tensor.offset)
    return found


def write_tensors(tensors: Sequence[Tensor], folder: Path | None) -> list[Tensor]:
    """Copies of tensors, on the CPU, that lie in a file of `folder` (None: the system's temporary folder).

    The file has no name, so nothing of it stays when the tensors are gone, however the process ends. OSError if the
    disk has too little space, before anything is written.
    """
    found = empty_tensors([(tensor.shape, tensor.dtype) for tensor in tensors], folder)
    for copy, tensor in zip(found, tensors, strict=True):
        copy.copy_(tensor)
        release([copy])
    return found


def empty_tensors(kinds: Sequence[tuple[Sequence[int], torch.dtype]], folder: Path | None) -> list[Tensor]:
    """Tensors of zeros, by shape and dtype, in a file without a name. What is written into them stays."""
    offsets, end = [], 0
    for shape, dtype in kinds:
        offsets.append(end)
        end += -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    with tempfile.TemporaryFile(dir=folder) as file:
        _allocate(file.fileno(), max(1, end))
        mapped = _map(file.fileno(), max(1, end), shared=True)
    return [_view(mapped, dtype, shape, offset) for (shape, dtype), offset in zip(kinds, offsets, strict=True)]


def map_file(file: Path, shape: Sequence[int], dtype: torch.dtype, *, create: bool = False) -> Tensor:
    """The tensor that a file of nothing else holds; what is written into it stays there.

    OSError if the file is not of that size, or, with `create`, if the disk has too little space.
    """
    length = max(1, prod(shape) * dtype.itemsize)
    with file.open("w+b" if create else "r+b") as opened:
        if create:
            _allocate(opened.fileno(), length)
        elif (found := os.fstat(opened.fileno()).st_size) != length:
            raise OSError(errno.EINVAL, f"{found} bytes instead of {length}", str(file))
        return _view(_map(opened.fileno(), length, shared=True), dtype, shape, 0)


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor lies in a file."""
    return _mapping_of(tensor) is not None


def announce(tensors: Iterable[Tensor]) -> None:
    """Has the system read the pages of tensors that lie in files, in the background; they take no memory that it could
    not use otherwise."""
    if not hasattr(mmap, "MADV_WILLNEED"):
        return
    for tensor in tensors:
        if (found := _mapping_of(tensor)) is not None:
            mapped, start = found
            for offset in range(start, start + tensor.nbytes, _READ_AHEAD):
                with contextlib.suppress(OSError):  # advice that the system is free not to take
                    _advise(mapped, offset, min(_READ_AHEAD, start + tensor.nbytes - offset), mmap.MADV_WILLNEED)


def release(tensors: Iterable[Tensor]) -> None:
    """Gives the memory of tensors that lie in files back to the system, and with it what was freed meanwhile.

    Of tensors that lie in no file, none.
    """
    given = False
    for tensor in tensors:
        if (found := _mapping_of(tensor)) is not None:
            _advise(*found, tensor.nbytes, mmap.MADV_DONTNEED)
            given = True
    if given and _malloc_trim is not None:
        _malloc_trim(0)


def _advise(mapped: mmap.mmap, start: int, nbytes: int, advice: int) -> None:
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    mapped.madvise(advice, first, start + nbytes - first)


def _find_malloc_trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`: without it, freed tensors of up to 32 MB stay with the process."""
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    return trim


_malloc_trim = _find_malloc_trim()


def _allocate(descriptor: int, length: int) -> None:
    """Takes the space from the disk now: a full one is an error here, not a fault when pages are written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, length)
    else:
        os.ftruncate(descriptor, length)


def _map(descriptor: int, length: int, *, shared: bool) -> mmap.mmap:
    flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE | _NO_RESERVE
    mapped = mmap.mmap(descriptor, length, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    address = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
    _mappings[:] = [entry for entry in _mappings if entry[1]() is not None]
    _mappings.append((address, weakref.ref(mapped)))
    _mappings.sort(key=lambda entry: entry[0])
    return mapped


def _view(mapped: mmap.mmap, dtype: torch.dtype, shape: Sequence[int], offset: int) -> Tensor:
    count = prod(shape)
    if count == 0:
        return torch.empty(*shape, dtype=dtype)
    if offset % dtype.itemsize:  # written by a program that does not align: a copy, since kernels may not read it
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=count * dtype.itemsize, offset=offset)
        return raw.clone().view(dtype).view(*shape)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).view(*shape)


def _mapping_of(tensor: Tensor) -> tuple[mmap.mmap, int] | None:
    """The mapping in which a tensor lies, and at which byte of it; None if it lies in none."""
    # Tensors of other classes may have no address: those of an estimate hold no values.
    if tensor.device.type != "cpu" or not _mappings or type(tensor) not in (Tensor, nn.Parameter):
        return None
    address = tensor.data_ptr()
    position = bisect_right(_mappings, address, key=lambda entry: entry[0]) - 1
    if position < 0:
        return None
    start, reference = _mappings[position]
    mapped = reference()
    return None if mapped is None or address >= start + len(mapped) else (mapped, address - start)
