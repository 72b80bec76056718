"""`record.json`: what a run was, what came out of it, and how it ended. Written early and often, always whole.

The file is strict JSON: numbers that JSON lacks are the strings "NaN", "Infinity" and "-Infinity", and `read_record`
turns them back into floats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from bs_exp.errors import RecordError
from bs_exp.files import write_file

FILE_NAME = "record.json"
FORMAT_VERSION = 1

_NOT_IN_JSON = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def utc_now() -> str:
    """The time as records write it: in milliseconds, for what ends and what begins anew may share a second."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Status(StrEnum):
    """How far a run came. A record that stays `running` belongs to a process that was killed."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run. Times are UTC (ISO 8601), `timings` seconds by stage, `memory` and sizes bytes."""

    name: str
    run_id: str
    status: Status
    started: str
    command: tuple[str, ...]
    config: Mapping[str, Any]
    config_hash: str
    process: int
    choices: Mapping[str, str] = field(default_factory=dict)  # option by group, such as model=demo
    sweep: Mapping[str, Any] | None = None  # id, job
    finished: str | None = None
    error: Mapping[str, Any] | None = None  # type, message, stage, traceback
    plan: Mapping[str, Any] | None = None  # RankPlan.to_dict()
    selection: Mapping[str, Any] = field(default_factory=dict)  # which candidate was chosen, by what, at what cost
    update: Mapping[str, Any] = field(default_factory=dict)  # what the update of the factors did, and its cost
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # dense, compressed
    size: Mapping[str, Any] = field(default_factory=dict)
    objective: float | Mapping[str, float] | None = None  # by metric where several were asked for
    model_folder: str | None = None  # where the compressed model was saved, relative to the run folder
    timings: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    cache: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # hits, misses, damaged; by kind
    provenance: Mapping[str, Any] = field(default_factory=dict)  # model, calibration
    versions: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] | None = None  # commit, dirty
    hardware: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain data for strict JSON."""
        plain: dict[str, Any] = _to_json({f.name: getattr(self, f.name) for f in fields(self)})
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; RecordError for another format version, unknown or missing fields."""
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise RecordError(f"format_version is {version!r}, this version of bs_exp reads {FORMAT_VERSION}.")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(data.keys() - known):
            raise RecordError(f"unknown fields {', '.join(unknown)}.")
        values = {key: _from_json(value) for key, value in data.items()}
        try:
            values["status"] = Status(values["status"])
            values["command"], values["notes"] = tuple(values["command"]), tuple(values["notes"])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise RecordError(f"not a run record: {error}.") from error


def write_record(record: RunRecord, folder: Path) -> Path:
    """Writes `folder/record.json` and returns its path; RecordError if it cannot be written."""
    path = folder / FILE_NAME
    text = json.dumps(record.to_dict(), indent=2, allow_nan=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, text)
    except OSError as error:
        raise RecordError(f"Cannot write {path}: {error}. Free some space, or set hydra.run.dir elsewhere.") from error
    return path


def read_record(path: Path) -> RunRecord:
    """The record in a file, or in a run folder."""
    if path.is_dir():
        path = path / FILE_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"Cannot read the record {path}: {error}.") from error
    except ValueError as error:
        raise RecordError(f"{path} is not JSON ({error}): half-written, or not a run record.") from error
    if not isinstance(data, dict):
        raise RecordError(f"{path} holds no JSON object: not a run record.")
    try:
        return RunRecord.from_dict(data)
    except RecordError as error:
        raise RecordError(f"Cannot read the record {path}: {error}") from error


def _to_json(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return next(name for name, number in _NOT_IN_JSON.items() if str(number) == str(value))
        case Mapping():
            return {str(key): _to_json(item) for key, item in value.items()}
        case list() | tuple():
            return [_to_json(item) for item in value]
        case _:
            return value


def _from_json(value: Any) -> Any:
    match value:
        case str() if value in _NOT_IN_JSON:
            return _NOT_IN_JSON[value]
        case dict():
            return {key: _from_json(item) for key, item in value.items()}
        case list():
            return [_from_json(item) for item in value]
        case _:
            return value
