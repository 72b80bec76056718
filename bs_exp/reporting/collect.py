"""The records below some folders. What cannot be read is named, never left out in silence."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bs_exp.errors import RecordError
from bs_exp.records.record import FILE_NAME, RunRecord, read_record
from bs_exp.records.sweep import PLAN_FILE, SweepPlan

PAIRS_FILE = "sharing_pays.json"
_MAPPINGS = (
    "config",
    "metrics",
    "size",
    "timings",
    "memory",
    "cache",
    "provenance",
    "versions",
    "hardware",
    "update",
    "choices",
)
_OPTIONAL_MAPPINGS = ("plan", "error", "source", "sweep")
_TEXTS = ("name", "run_id", "started", "config_hash")


@dataclass(frozen=True)
class Found:
    """A record and the folder of its run, as the reader of a report knows it."""

    record: RunRecord
    folder: Path


@dataclass(frozen=True)
class Skipped:
    """A file that looks like a result and cannot be used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Waiting:
    """A point that a sweep is to run and that has no record yet."""

    sweep: str
    settings: tuple[str, ...]


@dataclass(frozen=True)
class PairTable:
    """What sharing costs for every pair of layers of a matrix type: loss of one basis for both, minus both apart.

    `values[i][j]` belongs to layers `layers[i]` and `layers[j]`; negative means that sharing pays. None: not measured.
    `ratios` holds the loss of one basis as a share of both apart, by pair, where that is defined.
    """

    matrix: str
    layers: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]
    folder: Path
    unit: str
    ratios: Mapping[tuple[int, int], float] = field(default_factory=dict)


@dataclass(frozen=True)
class Collection:
    """All that a report is made of, in the order of sweeps, jobs and start times."""

    found: tuple[Found, ...]
    skipped: tuple[Skipped, ...]
    waiting: tuple[Waiting, ...]
    pairs: tuple[PairTable, ...]


def collect(folders: Sequence[Path]) -> Collection:
    """Every record below the folders, each once; RecordError if a folder does not exist or none can be read."""
    if absent := [folder for folder in folders if not folder.is_dir()]:
        raise RecordError(
            f"{absent[0]} is no folder. Name the folder of a run or of a sweep, as in outputs/sweeps/NAME."
        )
    found: list[Found] = []
    skipped: list[Skipped] = []
    waiting: list[Waiting] = []
    pairs: list[PairTable] = []
    for path in _files(folders):
        try:
            if path.name == FILE_NAME:
                found.append(Found(_sound(read_record(path)), path.parent))
            elif path.name == PLAN_FILE:
                waiting += _waiting(path.parent)
            else:
                pairs += _read_pairs(path)
        except RecordError as error:
            skipped.append(Skipped(path, str(error)))
    if not found:
        raise RecordError(_nothing(folders, skipped))
    return Collection(tuple(sorted(found, key=_order)), tuple(skipped), tuple(waiting), tuple(pairs))


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    seen: set[Path] = set()
    for top in folders:
        # Links are followed, because a sweep may link runs that another one has done already.
        for root, directories, files in os.walk(top, followlinks=True):
            place = Path(root).resolve()
            if place in seen:
                directories.clear()
                continue
            seen.add(place)
            directories[:] = sorted(name for name in directories if not name.startswith("."))
            yield from (Path(root) / name for name in (FILE_NAME, PLAN_FILE, PAIRS_FILE) if name in files)


def _nothing(folders: Sequence[Path], skipped: Sequence[Skipped]) -> str:
    places = ", ".join(map(str, folders))
    if not skipped:
        return f"There is no {FILE_NAME} below {places}. Run something first, as in python -m bs_exp sweeps=NAME."
    reasons = "\n".join(f"  {item.path}: {item.reason}" for item in skipped)
    return f"None of the records below {places} can be read:\n{reasons}"


def _order(found: Found) -> tuple[str, int, str, str]:
    sweep = found.record.sweep or {}
    job = sweep.get("job")
    return str(sweep.get("id", "")), job if isinstance(job, int) else 0, found.record.started, str(found.folder)


def _sound(record: RunRecord) -> RunRecord:
    """The record, if its fields are of the kinds that the report reads; RecordError says which is not."""
    for name in (*_MAPPINGS, *_OPTIONAL_MAPPINGS):
        value = getattr(record, name)
        if not isinstance(value, Mapping) and not (value is None and name in _OPTIONAL_MAPPINGS):
            raise RecordError(f"{name} is no JSON object: damaged, or not a run record.")
    for name in _TEXTS:
        if not isinstance(getattr(record, name), str):
            raise RecordError(f"{name} is no text: damaged, or not a run record.")
    if wrong := [label for label, metrics in record.metrics.items() if not isinstance(metrics, Mapping)]:
        raise RecordError(f"metrics.{wrong[0]} is no JSON object: damaged, or not a run record.")
    if wrong := [stage for stage, seconds in record.timings.items() if not isinstance(seconds, int | float)]:
        raise RecordError(f"timings.{wrong[0]} is no number: damaged, or not a run record.")
    if record.plan is not None:
        _check_plan(record.plan)
    return record


def _check_plan(plan: Mapping[str, Any]) -> None:
    try:
        for group in plan["groups"]:
            if not (isinstance(group["matrix"], str) and all(isinstance(layer, int) for layer in group["layers"])):
                raise RecordError("plan.groups names no matrix or no layers: damaged, or not a run record.")
            if not isinstance(group["rank"], int | None):
                raise RecordError(f"plan.groups has the rank {group['rank']!r}: damaged, or not a run record.")
    except (KeyError, TypeError) as error:
        raise RecordError(f"plan cannot be read ({error!r}): damaged, or not a run record.") from error


def _waiting(sweep: Path) -> Iterator[Waiting]:
    plan = SweepPlan.read(sweep)
    for point in (plan.points if plan else None) or ():
        if not (sweep / point.folder / FILE_NAME).exists():
            yield Waiting(sweep.name, point.settings)


def _read_pairs(path: Path) -> Iterator[PairTable]:
    """The pair tables of a file; RecordError if it is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        for table in data["tables"]:
            layers = tuple(int(layer) for layer in table["layers"])
            values = tuple(tuple(None if v is None else float(v) for v in row) for row in table["values"])
            if len(values) != len(layers) or any(len(row) != len(layers) for row in values):
                raise RecordError(f"the table of {table['matrix']} is not {len(layers)} by {len(layers)}.")
            ratios = {
                (int(pair["layers"][0]), int(pair["layers"][1])): float(pair["ratio"])
                for pair in table.get("pairs", ())
                if pair["ratio"] is not None
            }
            yield PairTable(str(table["matrix"]), layers, values, path.parent, str(data.get("unit", "")), ratios)
    except OSError as error:
        raise RecordError(f"cannot be read: {error}.") from error
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RecordError(f"not a table of pairs ({error!r}).") from error
