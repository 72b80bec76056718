"""A disk that is full in the middle of a point is no result of the point."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from bs_exp.search.storage import open_storage
from tests.support.deaths import FullDisk, end, start_command
from tests.support.sweeps import search_command

SECONDS = 120


def _completed(journal: Path) -> list[float]:
    storage = open_storage(str(journal), setting="storage")
    (name,) = optuna.get_all_study_names(storage)
    trials = optuna.load_study(study_name=name, storage=storage).trials
    return sorted(trial.params["retain_ratio"] for trial in trials if trial.state is TrialState.COMPLETE)


@pytest.mark.slow
def test_points_whose_records_found_no_space_are_repeated(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    command = search_command(tiny)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    assert end(start_command(command, whole, whole / "log"), SECONDS) == 0
    assert _completed(whole / "sweep" / "study.journal") == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    sizes = sorted(path.stat().st_size for path in whole.glob("sweep/*/record.json"))
    # Space for the other files of a run, and not for its finished record.
    assert end(start_command(command, cut, cut / "log", FullDisk(sizes[0] - 10)), SECONDS) == 1
    said = (cut / "log").read_text(errors="replace")
    assert "File too large" in said and "Traceback" not in said
    assert end(start_command(command, cut, cut / "log"), SECONDS) == 0
    assert _completed(cut / "sweep" / "study.journal") == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
