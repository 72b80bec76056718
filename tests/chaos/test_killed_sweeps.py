"""Sweeps that are killed at chosen events and at random times: what they find in the end is what it always is."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from bs_exp.records.record import RunRecord, Status
from bs_exp.search.storage import open_storage
from tests.support.campaign import Campaign
from tests.support.deaths import KILLED, OVERSIZED, BeforeFile, Death, InsideWrite, InStep, end, start_command
from tests.support.sweeps import POINTS, differences, leftovers, records, search_command, signature, sweep_command

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]
Start = Callable[[str, float], Campaign]
ROOT = Path(__file__).parents[2]
KILLS_EACH = 6
SECONDS = 240.0
# Of four points: how often files of a kind are touched at most where it is worth dying.
FILES = {"cache": 40, "model": 60, "record": 40, "plan": 3, "lock": 12, "other": 40}
STEPS = ("ask", "signature", "result", "tell", "tables")


@pytest.fixture(scope="module")
def undisturbed(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the sweep finds in a process of its own that nobody kills."""
    folder = tmp_path_factory.mktemp("undisturbed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "bs_exp", *sweep_command(tiny)], cwd=folder, env=environment, check=True)
    found = signature(folder / "sweep")
    assert len(found) == POINTS
    return found


def _death(draw: random.Random) -> Death | float:
    """An event, a write that is cut off, or seconds."""
    match draw.randrange(4):
        case 0:
            return InsideWrite(int(10 ** draw.uniform(2.5, 5.5)))
        case 1:
            return draw.uniform(0.5, 8.0)
        case _:
            kind = draw.choice(tuple(FILES))
            return BeforeFile(kind, draw.randint(1, FILES[kind]))


def _name(death: Death | float) -> str:
    match death:
        case BeforeFile(kind=kind):
            return kind
        case InStep(step=step):
            return step
        case InsideWrite():
            return "write"
        case _:
            return "time"


def _kill(command: list[str], folder: Path, death: Death | float) -> int | None:
    """Starts a command that dies in some way, or does not; returns how it ended."""
    timed = isinstance(death, float)
    process = start_command(command, folder, folder / "log", None if timed else death)
    if isinstance(death, float):
        process.join(death)
        if process.exitcode is None:
            process.kill()
    return end(process, SECONDS)


def _completed(sweep: Path) -> set[str]:
    found = records(sweep).items()
    return {name for name, record in found if isinstance(record, RunRecord) and record.status is Status.COMPLETED}


def test_sweeps(
    tmp_path: Path, tiny: tuple[str, ...], undisturbed: dict[str, Any], campaign: Callable[[str, float], Campaign]
) -> None:
    found = campaign("killed sweeps", 0.25)
    for case in found.cases(100):
        folder = tmp_path / str(case)
        folder.mkdir()
        kills, lost, other, command = 0, list[str](), list[str](), sweep_command(tiny)
        before: set[str] = set()
        for _ in range(KILLS_EACH):
            death = _death(found.draw)
            code = _kill(command, folder, death)
            if code in (KILLED, OVERSIZED):
                kills += 1
                found.details[f"in {_name(death)}"] += 1
            elif code != 0:
                other.append(f"exit code {code} after {death}: {(folder / 'log').read_text()[-600:]}")
            lost += differences(signature(folder / "sweep"), undisturbed, whole=False)
            now = _completed(folder / "sweep")
            lost += [f"point {name} was completed and is no more" for name in before - now]
            before = now
            if code == 0:
                break
        if code := end(start_command(command, folder, folder / "log"), SECONDS):
            other.append(f"the last start ended with {code}: {(folder / 'log').read_text()[-600:]}")
        lost += differences(signature(folder / "sweep"), undisturbed)
        # Elsewhere they are removed a day later: another process may be about to rename them.
        other += [f"{name} is left in a point" for point in (folder / "sweep").iterdir() for name in leftovers(point)]
        found.count(f"sweep {case}", tried=kills, lost=dict.fromkeys(lost), other=other)
        found.details["sweeps"] += 1
        found.details["temporary files that stay for a day"] += len(leftovers(folder))
    assert not found.faults, "\n".join(found.faults)


@pytest.mark.parametrize("storage", ["sweep/study.journal", "sqlite:///sweep/study.db"])
def test_searches_by_command(
    tmp_path: Path, tiny: tuple[str, ...], storage: str, campaign: Callable[[str, float], Campaign]
) -> None:
    """The records of the runs and the study say the same, and every point of the grid is there once."""
    kind = "on SQLite" if "sqlite" in storage else "on a journal"
    found = campaign(f"killed commands {kind}", 0.06)
    for case in found.cases(50):
        folder = tmp_path / str(case)
        (folder / "sweep").mkdir(parents=True)
        kills, lost, other = 0, list[str](), list[str]()
        command = search_command(tiny, f"hydra.sweeper.storage={storage}")
        for _ in range(KILLS_EACH):
            step = InStep(found.draw.choice(STEPS), found.draw.randint(1, 5))
            death = step if found.draw.random() < 0.6 else _death(found.draw)
            code = _kill(command, folder, death)
            if code in (KILLED, OVERSIZED):
                kills += 1
                found.details[f"in {_name(death)}"] += 1
            elif code != 0:
                other.append(f"exit code {code} after {death}: {(folder / 'log').read_text()[-600:]}")
            else:
                break
        if code := end(start_command(command, folder, folder / "log"), SECONDS):
            other.append(f"the last start ended with {code}: {(folder / 'log').read_text()[-600:]}")
        place = storage.replace("sweep/", f"{folder}/sweep/")
        (study,) = optuna.get_all_study_names(open_storage(place, setting="storage"))
        trials = optuna.load_study(study_name=study, storage=open_storage(place, setting="storage")).trials
        done = [trial for trial in trials if trial.state is TrialState.COMPLETE]
        lost += [f"trial {t.number} is {t.state.name}" for t in trials if not t.state.is_finished()]
        ratios = sorted(trial.params["retain_ratio"] for trial in done)
        if ratios != [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]:
            lost.append(f"the points {ratios} are completed")
        for trial in done:
            record = records(folder / "sweep").get(Path(trial.user_attrs["folder"]).name)
            if not isinstance(record, RunRecord) or record.objective != trial.value:
                lost.append(
                    f"trial {trial.number} has {trial.value}, its record {getattr(record, 'objective', record)}"
                )
        found.count(f"search {case}", tried=kills, lost=lost, other=other)
        found.details["searches"] += 1
    assert not found.faults, "\n".join(found.faults)
