"""`record.json`: the settings, results, cost and end of a run. Rewritten whenever one of them becomes known.

The file ends with a checksum of all the rest. It is strict JSON: numbers that JSON lacks are the strings "NaN",
"Infinity" and "-Infinity", and `read_record` turns them back into floats.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from bs_exp.errors import RecordError
from bs_exp.files import write_file
from bs_exp.records.parsing import (
    Check,
    below,
    check_fields,
    count,
    decode,
    encode,
    filled,
    json_object,
    list_of,
    moment,
    number,
    number_or_text,
    object_of,
    object_up_to,
    object_with,
    one_of,
    or_null,
    positive,
    read_object,
    text,
    text_up_to,
    truth,
)
from bs_exp.types import ExpertPlace, LossUnit, RankPlan

FILE_NAME = "record.json"
# Of the saved model, in the run's folder.
MODEL_FOLDER = "model"
FORMAT_VERSION = 1
# In `provenance`: bytes by name of every file of the saved model.
SAVED_FILES = "saved_files"
_CHECKSUM = "checksum"
# More than any model or run has. What is made of a record - tables with a column per layer, figures with a line per
# name - takes time and memory accordingly, and a record may come from anywhere.
_MOST_LAYERS = 10_000
_MOST_GROUPS = 50_000
_LARGEST_DIMENSION = 10**9
_MOST_NAMES = 10_000  # of metrics, notes
_MOST_STAGES = 1_000
_MOST_SETTINGS = 50_000
_LONGEST_NAME = 255


def utc_now() -> str:
    """The time in ISO 8601 with milliseconds, so that times of one second can be ordered as text."""
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
    precision: Mapping[str, Any] = field(default_factory=dict)  # in how many bits matrices were stored, what it changed
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # dense, compressed
    size: Mapping[str, Any] = field(default_factory=dict)
    objective: float | Mapping[str, float] | None = None  # by metric where several were asked for
    sample: Mapping[str, str] = field(default_factory=dict)  # prompt, and how dense and compressed continue it
    model_folder: str | None = None  # where the compressed model was saved, relative to the run folder
    timings: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    cache: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # hits, misses, damaged; by kind
    cost: Mapping[str, Any] = field(default_factory=dict)  # estimated before the run, and measured
    provenance: Mapping[str, Any] = field(default_factory=dict)  # model, calibration, code, files
    versions: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] | None = None  # commit, dirty
    hardware: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def method(self) -> str:
        """What was done: the name of the run, or the preset's where `name` was set to name a whole sweep."""
        names_sweep = any(setting.startswith("name=") for setting in (self.sweep or {}).get("settings", ()))
        return self.choices.get("experiment", self.name) if names_sweep else self.name

    @cached_property
    def rank_plan(self) -> RankPlan | None:
        """`plan` as it was made; None if the run ended before allocation."""
        return None if self.plan is None else RankPlan.from_dict(self.plan)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for strict JSON."""
        plain: dict[str, Any] = encode({f.name: getattr(self, f.name) for f in fields(self)})
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        RecordError for another format version, and for fields that are unknown, missing or of a wrong kind, by name.
        """
        if (version := data.get("format_version")) != FORMAT_VERSION:
            raise RecordError(f"format_version is {version!r:.60}, this version of bs_exp reads {FORMAT_VERSION}.")
        values: dict[str, Any] = decode(dict(data))
        check_fields(values, _CHECKS, _OPTIONAL, "a run record")
        values["status"] = Status(values["status"])
        values["command"], values["notes"] = tuple(values["command"]), tuple(values["notes"])
        return cls(**values)


def _objective(name: str, value: Any) -> None:
    (object_of(number) if isinstance(value, Mapping) else or_null(number))(name, value)


def _place(name: str, value: Any) -> None:
    """A layer, or [layer, expert]."""
    if not isinstance(value, list | tuple):
        below(_MOST_LAYERS, count)(name, value)
        return
    list_of(count, 2)(name, value)
    if len(value) != 2 or value[0] >= _MOST_LAYERS or value[1] >= ExpertPlace.MOST_EXPERTS:
        raise RecordError(f"{name} is no layer and expert (it is {value!r:.60})")


# As `RankPlan.to_dict` writes it.
_PLAN = object_with(
    frozenset({"groups", "requested_ratio"}),
    groups=filled(
        list_of(
            object_with(
                frozenset({"matrix", "layers", "d_in", "d_out", "rank", "parameters", "predicted_loss", "ridge"}),
                matrix=text_up_to(_LONGEST_NAME),
                layers=filled(list_of(_place, _MOST_LAYERS)),
                d_in=below(_LARGEST_DIMENSION, positive),
                d_out=below(_LARGEST_DIMENSION, positive),
                correction=below(_LARGEST_DIMENSION, count),
                rank=or_null(below(_LARGEST_DIMENSION, count)),
                parameters=count,
                predicted_loss=number,
                loss_unit=one_of(*LossUnit),
                ridge=number,
                damping=number,
            ),
            _MOST_GROUPS,
        )
    ),
    requested_ratio=number,
    layout=text,
    search=json_object,
    rounds=list_of(number),
)
_CHECKS: dict[str, Check] = {
    "name": text_up_to(_LONGEST_NAME),
    "run_id": text_up_to(_LONGEST_NAME),
    "status": one_of(*Status),
    "started": moment,
    "command": list_of(text),
    "config": object_up_to(_MOST_SETTINGS),
    "config_hash": text_up_to(_LONGEST_NAME),
    "process": count,
    "choices": object_of(text),
    "sweep": or_null(object_with(id=text, job=or_null(count), settings=list_of(text))),
    "finished": or_null(moment),
    "error": or_null(object_with(frozenset({"message"}), type=text, message=text, stage=or_null(text), traceback=text)),
    "plan": or_null(_PLAN),
    "selection": json_object,
    "update": json_object,
    "precision": json_object,
    "metrics": object_of(object_of(number_or_text, _MOST_NAMES)),
    "size": object_of(number),
    "objective": _objective,
    "sample": object_of(text),
    "model_folder": or_null(text),
    "timings": object_of(number, _MOST_STAGES),
    "memory": object_of(or_null(number)),
    "cache": object_of(object_of(count)),
    "cost": object_of(json_object),
    "provenance": object_with(
        model=json_object, calibration=json_object, dense_metrics=object_of(text), saved_files=object_of(count)
    ),
    "versions": object_of(or_null(text)),
    "source": or_null(object_with(commit=or_null(text), dirty=or_null(truth))),
    "hardware": object_with(
        cpu=text,
        cpu_cores=count,
        cpu_threads=count,
        memory_bytes=number,
        gpus=list_of(object_with(name=text, memory_bytes=number)),
    ),
    "notes": list_of(text, _MOST_NAMES),
    "format_version": count,
}
_OPTIONAL = frozenset(f.name for f in fields(RunRecord) if f.default is not MISSING or f.default_factory is not MISSING)


def write_record(record: RunRecord, folder: Path) -> Path:
    """Writes `folder/record.json` and returns its path; RecordError if it cannot be written."""
    path = folder / FILE_NAME
    data = record.to_dict()
    content = json.dumps({**data, _CHECKSUM: _checksum(data)}, indent=2, allow_nan=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    except OSError as error:
        raise RecordError(f"Cannot write {path}: {error}. Free some space, or set hydra.run.dir elsewhere.") from error
    return path


def read_record(path: Path) -> RunRecord:
    """The record in a file, or in a run folder; RecordError names the file and what is wrong with it.

    Its content must fit its checksum. Records of earlier versions have none.
    """
    if path.is_dir():
        path = path / FILE_NAME
    data = read_object(path, "a run record")
    recorded = data.pop(_CHECKSUM, None)
    try:
        record = RunRecord.from_dict(data)
    except RecordError as error:
        raise RecordError(f"Cannot read the record {path}: {error}") from error
    if recorded is not None and recorded != (found := _checksum(data)):
        raise RecordError(
            f"Cannot read the record {path}: its content (SHA-256 {found[:12]}...) does not fit its checksum "
            f"({recorded!r:.14}...): the disk, a transfer or somebody changed it. Restore it or run it again. Whoever "
            f'changed it on purpose removes its line "{_CHECKSUM}", and the comma before.'
        )
    return record


def _checksum(data: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of plain data, whatever the order of its names and the blanks in its file."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
