"""Optuna's own figures of a search, made from its tables."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from bs_exp.errors import RecordError
from bs_exp.records.trials import read_trials
from bs_exp.reporting.searches import search_figures

PARAMETERS = {"p": "0.005 to 0.2, log", "size": "one of 1, 2, 4", "allocation": "one of manual, uniform"}
HEADER = ["trial", "state", "ppl/text", "allocation", "size", "p", "seconds", "folder", "repeats", "error"]


def _write(folder: Path, trials: int = 8, **identity: Any) -> Path:
    rows: list[list[Any]] = []
    for i in range(trials):
        p = 0.01 * (i + 1)
        rows.append(
            [i, "completed", 30 + 10 * p, ("manual", "uniform")[i % 2], (1, 2, 4)[i % 3], p, "1.0", "x", "", ""]
        )
    rows.append([trials, "failed", "", "manual", 1, 0.5, "1.0", "x", "", "it went wrong"])
    with (folder / "trials.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    known = {"directions": ["minimize"], "objectives": ["objective"], "parameters": PARAMETERS, "settings": {}}
    about = {"study_name": "mine", "storage": "x", "identity": {**known, **identity}}
    (folder / "study.json").write_text(json.dumps(about))
    return folder / "trials.csv"


def test_tables_are_read_as_they_are_written(tmp_path: Path) -> None:
    table = read_trials(_write(tmp_path))
    assert (table.study, table.objectives, table.directions) == ("mine", ("ppl/text",), ("minimize",))
    assert (table.params, table.logarithmic) == (("allocation", "size", "p"), {"p"})
    assert len(table.trials) == 8  # a failed one has found nothing
    assert table.trials[1].params == {"allocation": "uniform", "size": 2.0, "p": 0.02}
    assert table.trials[1].values == (30.2,)


@pytest.mark.parametrize("damage", ["no study", "directions", "header"])
def test_what_is_no_table_is_named(tmp_path: Path, damage: str) -> None:
    path = _write(tmp_path, **({"directions": ["up"]} if damage == "directions" else {}))
    if damage == "no study":
        path.with_name("study.json").unlink()
    if damage == "header":
        path.write_text(path.read_text().replace("state", "estate", 1))
    with pytest.raises(RecordError, match=r"trials\.csv|study\.json"):
        read_trials(path)


def test_history_importances_and_parallel_coordinates(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    drawn = search_figures([read_trials(_write(tmp_path))])
    assert [figure.key.rpartition("-")[2] for figure in drawn] == ["history", "importances", "parallel"]
    history, importances, parallel = drawn
    assert "8 trials of mine; the best is trial 0: 30.10" in history.caption
    # The values depend on p alone.
    assert importances.caption.split(". ")[-1].startswith("p ")
    for name in PARAMETERS:
        assert name in importances.inline and name in parallel.inline
    assert "mathdefault" not in parallel.inline
    assert dict(mpl.rcParams) == before


def test_few_trials_have_no_importances(tmp_path: Path) -> None:
    assert [figure.key for figure in search_figures([read_trials(_write(tmp_path, 3))])] == [
        "search-1-ppl-text-history"
    ]
    assert search_figures([read_trials(_write(tmp_path, 1))]) == []
