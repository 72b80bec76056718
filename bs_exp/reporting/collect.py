"""The records, plans of sweeps and tables of pairs below some folders, with a list of those that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bs_exp.errors import RecordError
from bs_exp.records.pairs import PAIRS_FILE, PairTable, read_pairs
from bs_exp.records.record import FILE_NAME, RunRecord, read_record
from bs_exp.records.sweep import PLAN_FILE, SweepPlan


@dataclass(frozen=True)
class Found:
    """A record and the folder of its run, as given on the command line."""

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
class Collection:
    """The contents of a report; records are in the order of sweeps, jobs and start times."""

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
                found.append(Found(read_record(path), path.parent))
            elif path.name == PLAN_FILE:
                waiting += _waiting(path.parent)
            else:
                pairs += read_pairs(path)
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
    return sweep.get("id", ""), sweep.get("job") or 0, found.record.started, str(found.folder)


def _waiting(sweep: Path) -> Iterator[Waiting]:
    plan = SweepPlan.read(sweep)
    for point in (plan.points if plan else None) or ():
        if not (sweep / point.folder / FILE_NAME).exists():
            yield Waiting(sweep.name, point.settings)
