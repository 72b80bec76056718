"""Searches without models: the function that a test likes, and everything else as it is."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, BruteForceSampler, GridSampler, RandomSampler, TPESampler

from bs_exp.search import storage as storages
from bs_exp.search.search import Search, SearchSettings, TrialOutcome
from bs_exp.search.space import SearchSpace
from bs_exp.search.study import Identity

SPACE = SearchSpace({"x": FloatDistribution(-1.0, 1.0), "n": IntDistribution(0, 3)}, ("fixed=1",))
GRID = {"n": IntDistribution(0, 2), "c": CategoricalDistribution(("a", "b"))}
Values = Callable[[Mapping[str, Any]], tuple[float, ...]]


def parabola(point: Mapping[str, Any]) -> tuple[float, ...]:
    return ((point["x"] - 0.3) ** 2 + point["n"],)


def search(
    folder: Path,
    *,
    n_trials: int = 6,
    n_jobs: int = 1,
    storage: str | None = "",
    directions: tuple[str, ...] = ("minimize",),
    objectives: tuple[str, ...] = ("loss",),
    distributions: Mapping[str, BaseDistribution] | None = None,
    settings: Mapping[str, Any] | None = None,
    sampler: BaseSampler | None = None,
    max_failure_rate: float = 0.5,
    study_name: str = "study",
) -> Search:
    """A search whose study is `folder/study.journal` unless it is said to be elsewhere."""
    space = SearchSpace(distributions or SPACE.distributions, SPACE.fixed)
    return Search(
        settings=SearchSettings(
            n_trials=n_trials,
            n_jobs=n_jobs,
            directions=directions,
            storage=str(folder / "study.journal") if storage == "" else storage,
            study_name=study_name,
            max_failure_rate=max_failure_rate,
        ),
        space=space,
        identity=Identity(directions, objectives, space.describe(), settings or {"model": "tiny", "seed": 0}),
        sampler=sampler or RandomSampler(seed=1),
        folder=folder,
    )


class Runner:
    """Runs points by a function, and remembers them."""

    def __init__(self, values: Values = parabola) -> None:
        self.values = values
        self.points: list[Mapping[str, Any]] = []
        self.batches: list[tuple[int, int]] = []

    def __call__(self, points: Sequence[Mapping[str, Any]], first: int) -> Sequence[TrialOutcome]:
        self.batches.append((first, len(points)))
        outcomes = []
        for point in points:
            self.points.append(dict(point))
            overrides = tuple(f"{key}={value}" for key, value in point.items())
            try:
                outcomes.append(TrialOutcome(values=self.values(point), overrides=overrides))
            except ArithmeticError as error:
                outcomes.append(TrialOutcome(error=str(error), overrides=overrides))
        return outcomes


def work(folder: str, storage: str, n_trials: int, seconds: float, start: Any) -> None:
    """What a worker process does: takes part in a search, and leaves a file for every point that it runs."""
    path = Path(folder)

    def slow(point: Mapping[str, Any]) -> tuple[float, ...]:
        (path / f"ran-{os.getpid()}-{time.monotonic_ns()}").write_text(repr(point["x"]))
        time.sleep(seconds)
        return parabola(point)

    start.wait(60)
    search(path, storage=storage, n_trials=n_trials).run(Runner(slow))


def enumerate_all(kind: str) -> BaseSampler:
    """A sampler over GRID: both that enumerate it, and one that draws."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        match kind:
            case "brute force":
                return BruteForceSampler(seed=0)
            case "grid":
                return GridSampler({"n": [0, 1, 2], "c": ["a", "b"]}, seed=0)
            case _:
                return TPESampler(seed=0, n_startup_trials=2)


def take_part(folder: str, kind: str, n_trials: int, seconds: float, dies_at: int) -> None:
    """What a worker process does on GRID: leaves a file for every point that it has run.

    It is killed by SIGKILL in the middle of its write number `dies_at` to the study's journal, from 1 on; 0 is never.
    """
    path, journal, writes = Path(folder), Path(folder) / "study.journal", 0
    append = storages._Journal.append_logs

    def append_or_die(backend: storages._Journal, logs: list[dict[str, Any]]) -> None:
        nonlocal writes
        writes += 1
        if writes == dies_at:
            with backend._mutex, journal.open("ab") as file:
                file.write(json.dumps(logs[0], separators=(",", ":")).encode()[: 10 * dies_at])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        append(backend, logs)

    def slow(point: Mapping[str, Any]) -> tuple[float, ...]:
        time.sleep(seconds)
        (path / f"ran-{point['n']}{point['c']}-{os.getpid()}-{time.monotonic_ns()}").touch()
        return (point["n"],)

    if dies_at:
        storages._Journal.append_logs = append_or_die  # type: ignore[method-assign]
    sampler = enumerate_all(kind)
    search(path, n_trials=n_trials, distributions=GRID, sampler=sampler, settings={"seed": 0}).run(Runner(slow))


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Writes beyond a size are cut off there and fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
