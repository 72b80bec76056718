"""What a search found: the tables, the front, and the commands that run its best points again."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from bs_exp.search.study import ERROR, FOLDER, METRICS, OVERRIDES, REPEATS

TRIALS = "trials.csv"
FRONT_CSV, FRONT_JSON = "front.csv", "front.json"
BEST = "best.yaml"

_STATES = {
    TrialState.COMPLETE: "completed",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
    TrialState.PRUNED: "pruned",
}
_BEST_HEADER = """\
# The best of study {study}: {what}.
# Each command runs its point again, alone.
"""


@dataclass(frozen=True)
class Point:
    """A trial as tables and figures show it. `values` follow the objectives; a failed trial has none."""

    number: int
    state: str
    values: tuple[float, ...]
    params: Mapping[str, Any]
    seconds: float | None
    folder: str | None
    error: str | None
    repeats: int | None
    overrides: tuple[str, ...]

    @property
    def command(self) -> str:
        """Runs the point again, outside of the search."""
        return shlex.join(["python", "-m", "bs_exp", *self.again])

    @property
    def again(self) -> tuple[str, ...]:
        """The overrides of that command. A sweep file asks for a search, so the mode is set back."""
        return (*self.overrides, "hydra.mode=RUN")


@dataclass(frozen=True)
class Results:
    """All trials that count, and the best: one for one objective, the Pareto front for several."""

    study: str
    objectives: tuple[str, ...]
    directions: tuple[str, ...]
    points: tuple[Point, ...]
    best: tuple[Point, ...]

    @property
    def completed(self) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.values)

    @property
    def failed(self) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.error is not None)

    @property
    def is_front(self) -> bool:
        return len(self.objectives) > 1


def collect(study: optuna.Study, counted: Sequence[FrozenTrial], objectives: Sequence[str]) -> Results:
    """The results of a study, as far as the given trials of it; other processes may have ended more meanwhile.

    An objective that no setting names is called as the runs' records call it.
    """
    named = next((t.user_attrs[METRICS] for t in counted if t.user_attrs.get(METRICS)), objectives)
    points = {trial.number: _point(trial) for trial in counted}
    best = sorted(_best_of(study.directions, counted), key=lambda number: points[number].values)
    return Results(
        study=study.study_name,
        objectives=tuple(named if len(named) == len(objectives) else objectives),
        directions=tuple("minimize" if d is StudyDirection.MINIMIZE else "maximize" for d in study.directions),
        points=tuple(points.values()),
        best=tuple(points[number] for number in best),
    )


def _best_of(directions: Sequence[StudyDirection], trials: Sequence[FrozenTrial]) -> list[int]:
    """The number of the best trial, or those of the front; of equal ones the first. Nothing if none is completed."""
    completed = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    if not completed:
        return []
    # Of these trials alone: the study itself may know of a better one by now.
    known = optuna.create_study(directions=directions)
    known.add_trials(completed)
    if len(directions) == 1:
        return [completed[known.best_trial.number].number]
    front = {tuple(trial.values): completed[trial.number].number for trial in reversed(known.best_trials)}
    return list(front.values())


def save(results: Results, folder: Path) -> list[Path]:
    """Writes the tables into a folder, each under a temporary name first; where they lie."""
    inside = replace(results, points=_beside(results.points, folder), best=_beside(results.best, folder))
    files = {TRIALS: _csv(inside, inside.points), BEST: _best(inside)}
    if results.is_front:
        files |= {FRONT_CSV: _csv(inside, inside.best), FRONT_JSON: _json(inside)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(folder / name)
    return [folder / name for name in files]


def _beside(points: Sequence[Point], folder: Path) -> tuple[Point, ...]:
    """The same points, with folders relative to where the tables lie: a sweep's folder can be moved."""
    return tuple(replace(p, folder=os.path.relpath(p.folder, folder) if p.folder else None) for p in points)


def _point(trial: FrozenTrial) -> Point:
    attributes = trial.user_attrs
    overrides = tuple(attributes.get(OVERRIDES, ()))
    set_here = {override.split("=", 1)[0] for override in overrides}
    return Point(
        number=trial.number,
        state=_STATES[trial.state],
        values=tuple(trial.values) if trial.state is TrialState.COMPLETE else (),
        # Those of options that it did not choose say nothing.
        params={key: value for key, value in trial.params.items() if key in set_here or not overrides},
        seconds=trial.duration.total_seconds() if trial.duration is not None else None,
        folder=attributes.get(FOLDER),
        error=attributes.get(ERROR),
        repeats=attributes.get(REPEATS),
        overrides=overrides,
    )


def _csv(results: Results, points: Sequence[Point]) -> str:
    params = list(dict.fromkeys(key for point in results.points for key in point.params))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["trial", "state", *results.objectives, *params, "seconds", "folder", "repeats", "error"])
    for point in points:
        values = point.values or [""] * len(results.objectives)
        cells = [point.params.get(key, "") for key in params]
        seconds = "" if point.seconds is None else f"{point.seconds:.1f}"
        writer.writerow([point.number, point.state, *values, *cells, seconds, point.folder, point.repeats, point.error])
    return file.getvalue()


def _json(results: Results) -> str:
    front = {
        "study": results.study,
        "objectives": dict(zip(results.objectives, results.directions, strict=True)),
        "front": list(_entries(results)),
    }
    return json.dumps(front, indent=2) + "\n"


def _best(results: Results) -> str:
    named = zip(results.directions, results.objectives, strict=True)
    header = _BEST_HEADER.format(study=results.study, what=", ".join(f"{d} {name}" for d, name in named))
    entries: str = yaml.safe_dump(list(_entries(results)), sort_keys=False, width=120, allow_unicode=True)
    return header + entries


def _entries(results: Results) -> Iterator[dict[str, Any]]:
    for point in results.best:
        yield {
            "trial": point.number,
            "values": dict(zip(results.objectives, point.values, strict=True)),
            "params": dict(point.params),
            "folder": point.folder,
            "overrides": list(point.again),
            "command": point.command,
        }
