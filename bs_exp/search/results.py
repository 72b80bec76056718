"""What a search found: its trials, the best of them, and the tables of both."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from bs_exp.printable import printable, spreadsheet_cell
from bs_exp.search.folder import write_files
from bs_exp.search.study import ERROR, FOLDER, METRICS, OVERRIDES, REPEATS

_STATES = {TrialState.COMPLETE: "completed", TrialState.FAIL: "failed"}
_BEST_HEADER = """\
# The best of study {study}: {what}.
# Each command runs its point again, alone.
"""


@dataclass(frozen=True)
class TrialSummary:
    """A trial as tables and figures show it. `values` follow the objectives; a trial that did not complete has none."""

    number: int
    state: str
    values: tuple[float, ...]
    params: Mapping[str, Any]
    seconds: float | None
    folder: str | None
    error: str | None
    repeats: int | None
    overrides: tuple[str, ...]

    @classmethod
    def of(cls, trial: FrozenTrial) -> TrialSummary:
        """The summary of a trial of Optuna's."""
        attributes = trial.user_attrs
        overrides = tuple(attributes.get(OVERRIDES, ()))
        set_here = {override.split("=", 1)[0] for override in overrides}
        return cls(
            number=trial.number,
            state=_STATES.get(trial.state, trial.state.name.lower()),
            values=tuple(trial.values) if trial.state is TrialState.COMPLETE else (),
            # Parameters of options that the trial did not choose say nothing.
            params={key: value for key, value in trial.params.items() if key in set_here or not overrides},
            seconds=trial.duration.total_seconds() if trial.duration is not None else None,
            folder=attributes.get(FOLDER),
            error=attributes.get(ERROR),
            repeats=attributes.get(REPEATS),
            overrides=overrides,
        )

    @property
    def again(self) -> tuple[str, ...]:
        """The overrides that run the point again outside of the search; a sweep file asks for MULTIRUN."""
        return (*self.overrides, "hydra.mode=RUN")

    @property
    def command(self) -> str:
        """The command with these overrides."""
        return shlex.join(["python", "-m", "bs_exp", *self.again])

    def folder_beside(self, folder: Path) -> str | None:
        """Its folder relative to that of the tables, so that the whole can be moved."""
        return os.path.relpath(self.folder, folder) if self.folder else None


@dataclass(frozen=True)
class Results:
    """All trials that count, and the best: one for one objective, the Pareto front for several."""

    study: str
    objectives: tuple[str, ...]
    directions: tuple[str, ...]
    points: tuple[TrialSummary, ...]
    best: tuple[TrialSummary, ...]

    @property
    def completed(self) -> tuple[TrialSummary, ...]:
        return tuple(point for point in self.points if point.values)

    @property
    def failed(self) -> tuple[TrialSummary, ...]:
        return tuple(point for point in self.points if point.error is not None)

    @property
    def is_front(self) -> bool:
        return len(self.objectives) > 1


def collect(study: optuna.Study, counted: Sequence[FrozenTrial], objectives: Sequence[str]) -> Results:
    """The results of a study, as far as the given trials of it; other processes may have ended more meanwhile.

    An objective that no setting names is called as the runs' records call it. Of equal trials the first is the best.
    """
    named = next((t.user_attrs[METRICS] for t in counted if t.user_attrs.get(METRICS)), objectives)
    completed = [trial for trial in counted if trial.state is TrialState.COMPLETE]
    known = optuna.create_study(directions=study.directions)
    known.add_trials(completed)
    front = {tuple(trial.values): completed[trial.number] for trial in reversed(known.best_trials)}
    return Results(
        study=study.study_name,
        objectives=tuple(named if len(named) == len(objectives) else objectives),
        directions=tuple(direction.name.lower() for direction in study.directions),
        points=tuple(map(TrialSummary.of, counted)),
        best=tuple(TrialSummary.of(front[values]) for values in sorted(front)),
    )


def save(results: Results, folder: Path) -> None:
    """Writes trials.csv and best.yaml into a folder; of several objectives also front.csv and front.json."""
    wanted = dict(zip(results.objectives, results.directions, strict=True))
    best = [
        {
            "trial": point.number,
            "values": dict(zip(results.objectives, point.values, strict=True)),
            "params": dict(point.params),
            "folder": point.folder_beside(folder),
            "overrides": list(point.again),
            "command": point.command,
        }
        for point in results.best
    ]
    header = _BEST_HEADER.format(
        study=printable(results.study), what=printable(", ".join(f"{d} {name}" for name, d in wanted.items()))
    )
    files = {
        "trials.csv": _csv(results, results.points, folder),
        "best.yaml": header + yaml.safe_dump(best, sort_keys=False, width=120, allow_unicode=True),
    }
    if results.is_front:
        front = {"study": results.study, "objectives": wanted, "front": best}
        files["front.csv"] = _csv(results, results.best, folder)
        files["front.json"] = json.dumps(front, indent=2) + "\n"
    write_files(folder, files)


def _csv(results: Results, points: Iterable[TrialSummary], folder: Path) -> str:
    params = list(dict.fromkeys(key for point in results.points for key in point.params))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    header = ["trial", "state", *results.objectives, *params, "seconds", "folder", "repeats", "error"]
    writer.writerow([spreadsheet_cell(title) for title in header])
    for point in points:
        values = point.values or [""] * len(results.objectives)
        cells = [point.params.get(key, "") for key in params]
        seconds = "" if point.seconds is None else f"{point.seconds:.1f}"
        where = point.folder_beside(folder)
        row = [point.number, point.state, *values, *cells, seconds, where, point.repeats, point.error]
        writer.writerow([spreadsheet_cell(cell) for cell in row])
    return file.getvalue()
