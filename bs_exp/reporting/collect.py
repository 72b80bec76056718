"""The records, plans of sweeps and tables of pairs below some folders, with a list of those that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from bs_exp.errors import RecordError
from bs_exp.printable import printable, printable_data, shortened
from bs_exp.records.pairs import PAIRS_FILE, PairTable, read_pairs
from bs_exp.records.record import FILE_NAME, RunRecord, Status, read_record
from bs_exp.records.sweep import PLAN_FILE, SweepPlan, varying
from bs_exp.records.trials import TRIALS_FILE, TrialTable, read_trials

# Folders below a link that leads out of the folders to report on: those of runs and of sweeps, and no more of a disk.
_DEPTH_BEYOND = 1
_Read = TypeVar("_Read", RunRecord, PairTable, TrialTable)
_LONGEST_TEXT = 10_000
_LONGEST_REASON = 500
_MOST_REASONS = 10


@dataclass(frozen=True)
class Found:
    """A record, all its texts printable, and the folder of its run, as given on the command line."""

    record: RunRecord
    folder: Path


@dataclass(frozen=True)
class Skipped:
    """A file that looks like a result and cannot be used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Waiting:
    """A point that a sweep is to run and that has no record yet; `settings` set it apart from the sweep's others."""

    sweep: str
    settings: str


@dataclass(frozen=True)
class Claim:
    """What a sweep is to show, in the words of its file."""

    sweep: str
    text: str


@dataclass(frozen=True)
class Collection:
    """The contents of a report; records are in the order of sweeps, jobs and start times.

    `left` counts points without a result that their sweep no longer has: its grid, or code of others, has changed.
    """

    found: tuple[Found, ...]
    skipped: tuple[Skipped, ...]
    waiting: tuple[Waiting, ...]
    pairs: tuple[PairTable, ...]
    claims: tuple[Claim, ...] = ()
    left: int = 0
    searches: tuple[TrialTable, ...] = ()


def collect(folders: Sequence[Path]) -> Collection:
    """Every record below the folders, each once; RecordError if a folder does not exist or none can be read."""
    if absent := [folder for folder in folders if not folder.is_dir()]:
        raise RecordError(
            f"{absent[0]} is no folder. Name the folder of a run or of a sweep, as in outputs/sweeps/NAME."
        )
    found: list[Found] = []
    skipped: list[Skipped] = []
    waiting: list[Waiting] = []
    plans: dict[Path, SweepPlan] = {}
    pairs: list[PairTable] = []
    searches: list[TrialTable] = []
    for path in _files(folders):
        try:
            if path.name == FILE_NAME:
                found.append(Found(_printable(read_record(path)), path.parent))
            elif path.name == TRIALS_FILE:
                searches.append(_printable(read_trials(path)))
            elif path.name == PLAN_FILE:
                if (plan := SweepPlan.read(path.parent)) is not None:
                    plans[path.parent] = plan
                    waiting += _waiting(path.parent, plan)
            else:
                pairs += [_printable(table) for table in read_pairs(path)]
        except RecordError as error:
            skipped.append(Skipped(path, printable(shortened(str(error), _LONGEST_REASON))))
    if not found:
        raise RecordError(_nothing(folders, skipped))
    left = [point for point in found if _has_left(point, plans.get(point.folder.parent))]
    shown = [point for point in found if point not in left] or found
    claims = (
        Claim(printable(f.name), printable(shortened(p.claim, _LONGEST_TEXT))) for f, p in plans.items() if p.claim
    )
    return Collection(
        tuple(sorted(shown, key=_order)),
        tuple(skipped),
        tuple(waiting),
        tuple(pairs),
        tuple(claims),
        len(found) - len(shown),
        tuple(searches),
    )


def _has_left(point: Found, plan: SweepPlan | None) -> bool:
    """Whether a sweep that lists its points does not list this one, and it has no result either."""
    if plan is None or plan.points is None or point.record.status is Status.COMPLETED:
        return False
    return all(planned.folder != point.folder.name for planned in plan.points)


def _printable(found: _Read) -> _Read:
    """A record or table whose texts are safe in a terminal, an SVG file and a page, and short enough."""
    texts = {f.name: getattr(found, f.name) for f in fields(found) if f.name not in ("status", "folder")}
    keep = {name for name, value in texts.items() if not isinstance(value, str | tuple | list | Mapping)}
    keep |= {"values", "ratios", "layers", "trials", "logarithmic"}  # numbers, by numbers
    return replace(found, **{k: printable_data(v, _LONGEST_TEXT) for k, v in texts.items() if k not in keep})


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    tops = [folder.resolve() for folder in folders]
    seen: set[Path] = set()
    beyond: dict[Path, int] = {}  # levels below a link that leads out of the folders
    for top in folders:
        # Links are followed, because a sweep may link runs that another one has done already; but not far.
        for root, directories, files in os.walk(top, followlinks=True):
            folder = Path(root)
            place = folder.resolve()
            if place in seen:
                directories.clear()
                continue
            seen.add(place)
            if any(place.is_relative_to(other) for other in tops):
                directories[:] = sorted(name for name in directories if not name.startswith("."))
            else:
                level = beyond[folder] = beyond.get(folder.parent, -1) + 1
                within = level < _DEPTH_BEYOND
                directories[:] = sorted(n for n in directories if within and not n.startswith("."))
            yield from (folder / name for name in (FILE_NAME, PLAN_FILE, PAIRS_FILE, TRIALS_FILE) if name in files)


def _nothing(folders: Sequence[Path], skipped: Sequence[Skipped]) -> str:
    places = ", ".join(map(str, folders))
    if not skipped:
        return f"There is no {FILE_NAME} below {places}. Run something first, as in bs-exp sweeps=NAME."
    reasons = "\n".join(f"  {item.path}: {item.reason}" for item in skipped[:_MOST_REASONS])
    if len(skipped) > _MOST_REASONS:
        reasons += f"\n  and {len(skipped) - _MOST_REASONS:,} more"
    return f"None of the records below {places} can be read:\n{reasons}"


def _order(found: Found) -> tuple[str, int, str, str]:
    sweep = found.record.sweep or {}
    return sweep.get("id", ""), sweep.get("job") or 0, found.record.started, str(found.folder)


def _waiting(sweep: Path, plan: SweepPlan) -> Iterator[Waiting]:
    points = plan.points or ()
    for point, apart in zip(points, varying([point.settings for point in points]), strict=True):
        if not (sweep / point.folder / FILE_NAME).exists():
            yield Waiting(printable(sweep.name), printable_data(apart, _LONGEST_TEXT))
