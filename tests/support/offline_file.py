"""Reads what W&B wrote offline: a LevelDB log of protocol buffers, which `wandb sync` would upload."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_FILE_HEADER = 7
_RECORD_HEADER = struct.Struct("<IHB")  # checksum, length, kind
_BLOCK = 32 * 1024
_FULL, _LAST = 1, 4


@dataclass
class OfflineRun:
    """What a run's file says, with JSON values decoded."""

    run: Any = None
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None


def read_offline(folder: Path) -> OfflineRun:
    """The only run under `folder/wandb`, once it was closed: W&B's service still writes after the run has finished."""
    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 20
    while (found := _read(path)).exit_code is None:
        assert time.monotonic() < deadline, "the run was never closed"
        time.sleep(0.05)
    return found


def _read(path: Path) -> OfflineRun:
    found = OfflineRun()
    for record in map(Record.FromString, _records(path.read_bytes())):
        match record.WhichOneof("record_type"):
            case "run":
                found.run = record.run
                found.config |= _decoded(record.run.config.update)
            case "history":
                found.history.append(_decoded(record.history.item))
            case "summary":
                found.summary |= _decoded(record.summary.update)
            case "config":
                found.config |= _decoded(record.config.update)
            case "metric":
                found.metrics[record.metric.name or record.metric.glob_name] = record.metric
            case "artifact":
                found.artifacts.append(record.artifact)
            case "exit":
                found.exit_code = record.exit.exit_code
    return found


def _decoded(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(content: bytes) -> Iterator[bytes]:
    assert not content or content[:4] == b":W&B"
    position, parts = _FILE_HEADER, b""
    while position + _RECORD_HEADER.size <= len(content):
        if (left := _BLOCK - position % _BLOCK) < _RECORD_HEADER.size:
            position += left
            continue
        _, length, kind = _RECORD_HEADER.unpack_from(content, position)
        start = position + _RECORD_HEADER.size
        if start + length > len(content):  # still being written
            return
        parts += content[start : start + length]
        position = start + length
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""
