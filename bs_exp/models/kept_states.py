"""Hidden states in front of a block, kept on disk under a key, so that an interrupted walk goes on at that block."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from bs_exp.files import write_file
from bs_exp.models.mapped import map_file, release

_MARKER = "layer.json"


@dataclass(eq=False)
class KeptStates:
    """The states of all batches in front of one layer, or of two while a block runs: one file for each batch.

    A marker names the layer in front of which all states are complete, with their checksums; it is written last.
    """

    folder: Path
    _checksums: dict[tuple[int, int], str] = field(default_factory=dict)

    def put(self, layer: int, batch: int, states: Tensor) -> Tensor:
        """The states in front of a layer, in a file. Raises OSError."""
        values = states.detach().cpu().contiguous()
        stored = map_file(self._file(layer, batch), values.shape, values.dtype, create=True)
        stored.copy_(values)
        self._checksums[layer, batch] = _checksum(values)
        release([stored])
        return stored

    def complete(self, layer: int, batches: int) -> None:
        """Notes that the states in front of a layer are complete; those in front of the layer before are removed."""
        for batch in range(batches):
            with self._file(layer, batch).open("rb") as file:
                os.fsync(file.fileno())
        checksums = [self._checksums.pop((layer, batch)) for batch in range(batches)]
        write_file(self.folder / _MARKER, json.dumps({"layer": layer, "checksums": checksums}))
        for batch in range(batches):
            self._file(layer - 1, batch).unlink(missing_ok=True)

    def found(self, like: Sequence[Tensor]) -> tuple[int, list[Tensor]] | None:
        """The layer and the states that an earlier walk left, of these shapes and dtypes; None if any is damaged."""
        try:
            marker = json.loads((self.folder / _MARKER).read_text(encoding="utf-8"))
            layer, checksums = int(marker["layer"]), list(marker["checksums"])
            states = [map_file(self._file(layer, i), each.shape, each.dtype) for i, each in enumerate(like)]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        for stored, checksum in zip(states, [*checksums, *[None] * len(states)], strict=False):
            if _checksum(stored) != checksum:
                return None
            release([stored])
        return layer, states

    def _file(self, layer: int, batch: int) -> Path:
        return self.folder / f"{layer}-{batch}.states"


@contextmanager
def kept_states(folder: Path, key: str) -> Iterator[KeptStates | None]:
    """The kept states of a key, removed at the end of a walk that ends well; None while another process holds them.

    Raises OSError if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield None
        return
    try:
        place = folder / key
        place.mkdir(exist_ok=True)
        yield KeptStates(place)
        shutil.rmtree(place, ignore_errors=True)
    finally:
        lock.release()


def _checksum(states: Tensor) -> str:
    return f"{zlib.crc32(states.reshape(-1).view(torch.uint8).numpy().data):08x}"
