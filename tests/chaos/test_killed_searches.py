"""Searches by 1, 2 and 4 processes that are killed in every step: each point is run once, whoever died when."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from itertools import product
from multiprocessing.process import BaseProcess
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from bs_exp.errors import SearchError
from bs_exp.search.storage import file_of, open_storage
from bs_exp.search.study import REPEATS
from tests.support.campaign import Campaign
from tests.support.deaths import (
    ENUMERATING,
    KILLED,
    OVERSIZED,
    SAMPLERS,
    STEPS,
    Death,
    InsideWrite,
    InStep,
    end,
    start_worker,
    value_of,
)

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]
KILLS = 200
KILLS_EACH = 5
# A database makes its tables first, which takes seconds: it has every third search.
PLACES = ("{}/study.journal", "{}/study.journal", "sqlite:///{}/study.db")
# Propose a point a second time by themselves: a child equal to its parent, the same end of an interval.
REPEATING = ("nsga2", "gp")
# Ten minutes pass until a silent process of another host is given up: here nobody waits.
LIMBO = 90.0
POINTS = {(n, c) for n in (0, 1, 2) for c in "ab"}


def _death(draw: random.Random, place: str) -> Death:
    """A step, or a write that the kernel cuts off at some byte of what the next trials add to the study."""
    if draw.random() < 0.75:
        return InStep(draw.choice(STEPS), draw.randint(1, 4))
    file = file_of(place)
    size = file.stat().st_size if file is not None and file.exists() else 0
    return InsideWrite(size + draw.randint(1, 6000))


def _name(death: Death | None) -> str:
    return death.step if isinstance(death, InStep) else "write"


def _trials(place: str) -> list[FrozenTrial]:
    return optuna.load_study(study_name="study", storage=open_storage(place, setting="storage")).trials


def _lost(folder: Path, place: str, sampler: str, kills: int) -> list[str]:
    """What of the six points was lost, doubled or changed."""
    try:
        trials = _trials(place)
    except SearchError as error:
        return [f"the study cannot be read: {error}"]
    lost = [f"trial {t.number} is {t.state.name}" for t in trials if not t.state.is_finished()]
    done = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    if len(done) != 6:
        lost.append(f"{len(done)} trials are completed, not 6")
    lost += [f"trial {t.number} has {t.values}" for t in done if t.values != [value_of(t.params)]]
    # The point of a dropped trial is run again by one other trial.
    repeats = Counter(trial.user_attrs[REPEATS] for trial in trials if REPEATS in trial.user_attrs)
    lost += [f"trial {number} is repeated {count} times" for number, count in repeats.items() if count > 1]
    dropped = {trial.number for trial in trials if trial.state is TrialState.FAIL}
    lost += [f"trial {number} failed, and is not repeated" for number in dropped - repeats.keys()]
    lost += [f"trial {number} is repeated and did not fail" for number in repeats.keys() - dropped]
    points = Counter(tuple(trial.params.values()) for trial in done)
    if sampler not in REPEATING:
        lost += [f"point {point} is there {count} times" for point, count in points.items() if count > 1]
    if sampler in ENUMERATING:
        lost += [f"point {point} is missing" for point in POINTS - points.keys()]
    lost += [f"two processes at once had {path.name}" for path in folder.glob("twice-*")]
    ran = len(list(folder.glob("ran-*")))
    if ran > len(done) + kills:
        lost.append(f"{ran} runs for {len(done)} points and {kills} kills")
    return lost


def _campaign(campaign: Campaign, folder: Path, place: str, sampler: str, workers: int, most: int) -> int:
    """Processes that are killed and started again until `most` were killed; then all end. Returns the kills."""
    draw, kills, other = campaign.draw, 0, list[str]()

    processes: list[tuple[BaseProcess, Death | None]] = []

    def start() -> None:
        death = _death(draw, place) if kills < most else None
        processes.append((start_worker(folder, place, sampler, 0.02, death), death))

    for _ in range(workers):
        start()
    limit = time.monotonic() + LIMBO * 2
    while processes:
        process, death = processes.pop(0)
        process.join(0.02)
        if process.exitcode is None:
            if time.monotonic() > limit:
                process.kill()
                other.append("a process did not end")
            else:
                processes.append((process, death))
        elif process.exitcode in (KILLED, OVERSIZED) and death is not None:
            kills += 1
            campaign.details[f"in {_name(death)}"] += 1
            start()
        elif process.exitcode:
            other.append(f"exit code {process.exitcode}: {(folder / 'log').read_text()[-600:]}")
    before = time.monotonic()
    code = end(start_worker(folder, place, sampler, 0.0), LIMBO)
    if code != 0:
        other.append(f"the last process ended with {code} after {time.monotonic() - before:.0f} s")
    case = f"{sampler}, {workers} workers, {place.partition('study.')[2]}, {folder.name}"
    campaign.count(case, tried=kills, lost=_lost(folder, place, sampler, kills), other=other)
    return kills


def test_searches(tmp_path: Path, campaign: Callable[[str, float], Campaign]) -> None:
    found = campaign("killed searches", 0.35)
    combinations = [*product(SAMPLERS, (1, 2, 4), PLACES)]
    found.draw.shuffle(combinations)
    kills = 0
    for case in found.cases(10 * len(combinations)):
        if kills >= KILLS:
            break
        sampler, workers, place = combinations[case % len(combinations)]
        folder = tmp_path / str(case)
        folder.mkdir()
        kills += _campaign(found, folder, place.format(folder), sampler, workers, KILLS_EACH)
        found.details["searches"] += 1
    assert kills
    assert not found.faults, "\n".join(found.faults)
