"""The trials of a search as its tables hold them: `trials.csv`, and the directions and ranges in `study.json`."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bs_exp.errors import RecordError
from bs_exp.files import read_text

TRIALS_FILE, STUDY_FILE = "trials.csv", "study.json"
# Columns before the objectives, and after the parameters.
_FIRST, _LAST = ("trial", "state"), ("seconds", "folder", "repeats", "error")
# More than any search has; a table may come from anywhere.
_MOST_BYTES = 64 << 20
_MOST_TRIALS, _MOST_PARAMETERS = 20_000, 200


@dataclass(frozen=True)
class CompletedTrial:
    """A trial that found something: a value for every objective, and its parameters as numbers or texts."""

    number: int
    values: tuple[float, ...]
    params: Mapping[str, float | str]


@dataclass(frozen=True)
class TrialTable:
    """A search: its objectives and their directions (`minimize`, `maximize`), and its completed trials.

    `logarithmic` are the parameters that were searched in their logarithm.
    """

    study: str
    objectives: tuple[str, ...]
    directions: tuple[str, ...]
    params: tuple[str, ...]
    logarithmic: frozenset[str]
    trials: tuple[CompletedTrial, ...]


def read_trials(path: Path) -> TrialTable:
    """The table in a file of a search's folder; RecordError names the file and what is wrong with it."""
    try:
        about = json.loads(read_text(path.with_name(STUDY_FILE), most_bytes=_MOST_BYTES))
        identity = about["identity"]
        directions, described = [str(d) for d in identity["directions"]], dict(identity["parameters"])
        rows = list(csv.reader(io.StringIO(read_text(path, most_bytes=_MOST_BYTES))))
        header, body = rows[0], rows[1:]
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError, csv.Error) as error:
        raise RecordError(f"{path} is no table of a search with its {STUDY_FILE} ({error!r:.200}).") from error
    start, end = len(_FIRST), len(header) - len(_LAST)
    split = start + len(directions)
    if tuple(header[:start]) != _FIRST or tuple(header[end:]) != _LAST or not start < split <= end:
        raise RecordError(f"{path} is no table of a search: its columns are {', '.join(header)[:200]}.")
    if set(directions) - {"minimize", "maximize"}:
        raise RecordError(f"{path.with_name(STUDY_FILE)} names directions that do not exist: {directions!r:.100}.")
    if len(body) > _MOST_TRIALS or end - split > _MOST_PARAMETERS:
        raise RecordError(f"{path} holds more than {_MOST_TRIALS} trials or {_MOST_PARAMETERS} parameters.")
    params = tuple(header[split:end])
    trials = []
    for row in body:
        if len(row) == len(header) and row[1] == "completed":
            values = tuple(_number(cell) for cell in row[start:split])
            if all(value is not None for value in values) and row[0].isdigit():
                known = {name: cell for name, cell in zip(params, row[split:end], strict=True) if cell}
                given = {name: cell if (n := _number(cell)) is None else n for name, cell in known.items()}
                trials.append(CompletedTrial(int(row[0]), tuple(v for v in values if v is not None), given))
    logarithmic = frozenset(name for name in params if _is_logarithmic(described.get(name)))
    study = about.get("study_name")
    name = study if isinstance(study, str) else path.parent.name
    return TrialTable(name, tuple(header[start:split]), tuple(directions), params, logarithmic, tuple(trials))


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _is_logarithmic(description: Any) -> bool:
    return isinstance(description, str) and description.endswith(", log")
