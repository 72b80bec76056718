"""A sweep on disk: one folder per point, found by the hash of its configuration.

    outputs/sweeps/NAME/sweep.json                        what is run, and since when
    outputs/sweeps/NAME/svd@0.8-0a1b2c3d4e5f/record.json  a point: at the end of the name, its configuration's hash

The same settings have the same folder whatever the order of the grid, the launcher or the process. A point is run by
one process at a time. Completed points are kept; those that failed or were killed are run again.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from filelock import FileLock, Timeout

from bs_exp.errors import RecordError
from bs_exp.files import file_sizes, read_text, remove_leftovers, remove_scratch, write_file
from bs_exp.printable import printable
from bs_exp.records.inputs import changed_inputs
from bs_exp.records.metrics import default_objective
from bs_exp.records.parsing import (
    Check,
    check_fields,
    decode,
    encode,
    list_of,
    moment,
    object_with,
    or_null,
    plain_name,
    read_object,
    text,
)
from bs_exp.records.record import FILE_NAME, MODEL_FOLDER, SAVED_FILES, RunRecord, Status, read_record

PLAN_FILE = "sweep.json"
_LOCK = ".lock"
_OWNER = ".owner"
_LONGEST_OWNER = 400
_POLL_SECONDS = 0.2


def shown_settings(overrides: Iterable[str]) -> tuple[str, ...]:
    """Overrides of a point, as the command line takes them, without the name of its sweep."""
    return tuple(override for override in overrides if not override.startswith("sweeps="))


@dataclass(frozen=True)
class SweepPoint:
    """A point of a sweep: the name of its folder, and its settings as the command line takes them."""

    folder: str
    settings: tuple[str, ...]


@dataclass(frozen=True)
class SweepPlan:
    """The points that one start of a sweep runs; `points` is None where a sweeper chooses them one after the other.

    `claim` is what its file says that it is to show; empty if it says nothing.
    """

    name: str
    command: tuple[str, ...]
    started: str
    points: tuple[SweepPoint, ...] | None
    claim: str = ""

    def write(self, folder: Path) -> None:
        """Writes `folder/sweep.json`; RecordError if it cannot be written."""
        path = folder / PLAN_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            write_file(path, json.dumps(encode(asdict(self)), indent=2) + "\n")
        except OSError as error:
            raise RecordError(f"Cannot write {path}: {error}. Free some space, or set hydra.sweep.dir.") from error

    @classmethod
    def read(cls, folder: Path) -> SweepPlan | None:
        """The plan in a folder, None if it holds none; RecordError if it cannot be read."""
        path = folder / PLAN_FILE
        if not path.exists():
            return None
        try:
            data = decode(read_object(path, "a plan of a sweep"))
            check_fields(data, _CHECKS, frozenset({"claim"}), "a plan of a sweep")
        except RecordError as error:
            raise RecordError(
                f"{path} is no plan of a sweep ({error}); remove it and start the sweep again."
            ) from error
        points = data["points"]
        return cls(
            name=data["name"],
            command=tuple(data["command"]),
            started=data["started"],
            points=None if points is None else tuple(SweepPoint(p["folder"], tuple(p["settings"])) for p in points),
            claim=data.get("claim", ""),
        )


_CHECKS: dict[str, Check] = {
    "name": text,
    "command": list_of(text),
    "started": moment,
    "claim": text,
    "points": or_null(
        list_of(object_with(frozenset({"folder", "settings"}), folder=plain_name, settings=list_of(text)))
    ),
}


def _tell(line: str) -> None:
    print(printable(line), file=sys.stderr)


def finished_record(
    folder: Path,
    config_hash: str,
    *,
    with_model: bool,
    inputs: Mapping[str, str] | None = None,
    tell: Callable[[str], None] | None = _tell,
) -> RunRecord | None:
    """The record of a point that need not be run again: completed as configured, with the model saved if asked for.

    `inputs` are stamps of the files that it would read now (`file_stamps`). A record that cannot be read, or was made
    from other content, is told (on stderr), and its point is run again.
    """
    tell = tell or (lambda line: None)
    if not (folder / FILE_NAME).exists():
        return None
    try:
        record = read_record(folder)
    except RecordError as error:
        tell(f"{error} The point is run again.")
        return None
    if record.status is not Status.COMPLETED or record.config_hash != config_hash:
        return None
    if with_model and (fault := _model_fault(record, folder)):
        tell(f"{fault} Point {folder.name} is run again.")
        return None
    if changed := changed_inputs(record, inputs or {}):
        tell(f"{', '.join(changed)} changed since point {folder.name} was run: it is run again.")
        return None
    return record


def _model_fault(record: RunRecord, folder: Path) -> str | None:
    """What is wrong with the saved model of a point, by the names and sizes of its files; None if nothing is."""
    if record.model_folder is None:
        return "No model was saved."
    model = folder / record.model_folder
    if not model.is_dir():
        return f"The saved model {model} is gone."
    found = file_sizes(model)
    noted = record.provenance.get(SAVED_FILES)
    if not isinstance(noted, Mapping):  # an earlier version noted the size of all weights together
        stored = sum(size for name, size in found.items() if name.endswith(".safetensors") and "/" not in name)
        whole = record.size.get("saved_bytes", stored) == stored
        return (
            None
            if whole
            else f"{model}/*.safetensors hold {stored:,} bytes, {record.size['saved_bytes']:,} were saved."
        )
    for name, size in noted.items():
        if name not in found:
            return f"{model / name} is gone."
        if found[name] != size:
            return f"{model / name} has {found[name]:,} bytes, {size} were saved."
    return None


@contextmanager
def occupied(folder: Path) -> Iterator[Path]:
    """Holds a point for this process, and gives its folder; waits, and says so once, while another process runs it.

    The operating system lets go of the lock when a process ends, also if it was killed. What such a process left
    half-written is removed. RecordError if the folder cannot be locked or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            message = f"{folder.name} is under way in {_owner(folder)}: waiting for it to end."
            print(printable(message), file=sys.stderr)
            lock.acquire(poll_interval=_POLL_SECONDS)
    except (OSError, NotImplementedError) as error:
        lock.release()
        raise RecordError(
            f"Cannot lock {folder / _LOCK}: {error}. Put the sweep on a file system with locks: hydra.sweep.dir=FOLDER."
        ) from error
    try:
        # Whoever holds the lock is the only one that writes here.
        remove_leftovers(folder, older_than=0.0)
        remove_scratch(folder / MODEL_FOLDER, older_than=0.0)
        try:
            write_file(folder / _OWNER, f"process {os.getpid()} on {socket.gethostname()}")
        except OSError as error:
            raise RecordError(
                f"Cannot write {folder / _OWNER}: {error}. Free some space, or set hydra.sweep.dir."
            ) from error
        yield folder
    finally:
        (folder / _OWNER).unlink(missing_ok=True)
        lock.release()


def _owner(folder: Path) -> str:
    try:
        return read_text(folder / _OWNER, most_bytes=_LONGEST_OWNER)
    except (OSError, UnicodeDecodeError):  # just taken, or just let go
        return "another process"


def _is_occupied(folder: Path) -> bool:
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


class PointOutcome(StrEnum):
    """How a point stands after this start of the sweep."""

    COMPLETED = "completed"
    KEPT = "kept"  # completed before this start, and not run again
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    KILLED = "killed"
    RUNNING = "running"  # in another process
    NOT_RUN = "not run"


@dataclass(frozen=True)
class PointState:
    """A point, what became of it, and its record if it has one that can be read."""

    point: SweepPoint
    outcome: PointOutcome
    record: RunRecord | None

    @property
    def is_fresh(self) -> bool:
        """Whether it came to an end in this start."""
        return self.outcome in (PointOutcome.COMPLETED, PointOutcome.FAILED)


def survey(folder: Path, plan: SweepPlan) -> list[PointState]:
    """All points of the plan, or, where the plan lists none, all that have a folder, in the order of their start."""
    if plan.points is not None:
        return [_state(folder, point, plan.started) for point in plan.points]
    found = [_state(folder, SweepPoint(path.parent.name, ()), plan.started) for path in folder.glob(f"*/{FILE_NAME}")]
    return sorted(found, key=lambda state: state.record.started if state.record else "")


def _state(sweep: Path, point: SweepPoint, started: str) -> PointState:
    folder = sweep / point.folder
    try:
        record = read_record(folder)
    except RecordError:
        return PointState(point, PointOutcome.NOT_RUN, None)
    if not point.settings and record.sweep:
        point = SweepPoint(point.folder, tuple(record.sweep.get("settings", ())))
    # Both times are UTC in ISO 8601, which sorts as text.
    is_new = (record.finished or record.started) >= started
    match record.status:
        case Status.COMPLETED:
            outcome = PointOutcome.COMPLETED if is_new else PointOutcome.KEPT
        case Status.FAILED:
            outcome = PointOutcome.FAILED if is_new else PointOutcome.NOT_RUN
        case Status.INTERRUPTED:
            outcome = PointOutcome.INTERRUPTED if is_new else PointOutcome.NOT_RUN
        case Status.RUNNING:
            outcome = PointOutcome.RUNNING if _is_occupied(folder) else PointOutcome.KILLED
    return PointState(point, outcome, record)


def varying(settings: Sequence[tuple[str, ...]]) -> list[str]:
    """Each point's settings without those that all points have in common, as one line."""
    common = set.intersection(*map(set, settings)) if len(settings) > 1 else set()
    return [" ".join(s for s in own if s not in common) or " ".join(own) for own in settings]


def print_progress(folder: Path) -> None:
    """Prints to stderr how many points of the sweep have ended, after the point in `folder`."""
    plan = SweepPlan.read(folder.parent)
    # A sweeper that chooses its points knows more of them, and tells it itself.
    if plan is not None and plan.points is not None and (states := survey(folder.parent, plan)):
        print(printable(progress_line(states, folder.name, plan)), file=sys.stderr, flush=True)


def progress_line(states: Sequence[PointState], current: str, plan: SweepPlan) -> str:
    """The line printed after a point: `[3/16] completed experiment=svd  ppl/text 113.6  41 s; about 9 min left`."""
    labels = varying([state.point.settings for state in states])
    found = [(s, label) for s, label in zip(states, labels, strict=True) if s.point.folder == current]
    if not found:  # another start of the sweep, with other settings, has written its plan meanwhile
        return f"{current} ended"
    state, label = found[0]
    ended = sum(s.is_fresh or s.outcome is PointOutcome.KEPT for s in states)
    total = f"/{len(states)}" if plan.points is not None else ""
    parts = [f"[{ended}{total}] {state.outcome} {label}".rstrip()]
    if state.record is not None and state.outcome in (PointOutcome.COMPLETED, PointOutcome.KEPT):
        parts.append(result(state.record))
    if state.record is not None and state.is_fresh:
        parts.append(duration(seconds(state.record)))
    fresh, left = sum(s.is_fresh for s in states), len(states) - ended if plan.points is not None else 0
    # Points end at this pace, however many run at once.
    pace = (time.time() - datetime.fromisoformat(plan.started).timestamp()) / fresh if fresh else 0.0
    tail = f"; about {duration(pace * left)} left" if fresh and left else ""
    return "  ".join(part for part in parts if part) + tail


def result(record: RunRecord) -> str:
    """The objectives of a run as a line; empty without any."""
    return "  ".join(f"{name} {value:.5g}" for name, value in objectives(record).items())


def objectives(record: RunRecord) -> Mapping[str, float]:
    """The objectives of a run by metric; empty without any."""
    if record.objective is None or isinstance(record.objective, Mapping):
        return record.objective or {}
    name = record.config.get("objective") or default_objective(record.metrics.get("compressed", {})) or "objective"
    return {name: record.objective}


def kept_objective(record: RunRecord) -> float | tuple[float, ...] | None:
    """The value, or one value per objective, that a finished run returned to its sweeper."""
    return tuple(record.objective.values()) if isinstance(record.objective, Mapping) else record.objective


def seconds(record: RunRecord) -> float:
    """Seconds from the start of a run to its end; 0 if it has not ended."""
    if record.finished is None:
        return 0.0
    return (datetime.fromisoformat(record.finished) - datetime.fromisoformat(record.started)).total_seconds()


def duration(value: float) -> str:
    """Seconds, minutes or hours, as text."""
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
