"""The loop: what it runs, tells and keeps, alone and beside others."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import (
    BaseSampler,
    BruteForceSampler,
    CmaEsSampler,
    GPSampler,
    GridSampler,
    NSGAIISampler,
    TPESampler,
)

from bs_exp.errors import ConfigError, SearchError
from bs_exp.search.results import Results
from bs_exp.search.search import Search, SearchSettings
from bs_exp.search.storage import open_storage, shown
from tests.support.searches import Runner, parabola, search, work

# A fresh interpreter, as a second command is one: a fork would inherit this one's locks and threads.
PROCESSES = multiprocessing.get_context("spawn")


def stored(folder: Path) -> optuna.storages.BaseStorage:
    return open_storage(str(folder / "study.journal"), setting="hydra.sweeper.storage")


def conclude(one: Search, runner: Runner) -> Results:
    ended = one.run(runner)
    one.conclude(ended)
    return ended.results


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name, without locks."""
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*") if path.is_file()}


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="study", storage=stored(folder)).trials


@pytest.mark.parametrize("n_jobs", [1, 4])
def test_a_search_runs_its_trials_and_keeps_the_best(tmp_path: Path, n_jobs: int) -> None:
    runner = Runner()
    results = conclude(search(tmp_path, n_jobs=n_jobs), runner)
    assert len(runner.points) == 6
    assert runner.batches == ([(i, 1) for i in range(6)] if n_jobs == 1 else [(0, 4), (4, 2)])
    expected = min(parabola(point) for point in runner.points)
    assert results.best[0].values == expected
    assert [float(row["loss"]) for row in rows(tmp_path)] == [parabola(point)[0] for point in runner.points]
    best = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert [entry["values"] for entry in best] == [{"loss": expected[0]}]
    assert best[0]["overrides"][-1] == "hydra.mode=RUN"
    assert {path.name for path in tmp_path.iterdir()} >= {"history.png", "history.svg"}


def test_the_same_seed_searches_the_same_points(tmp_path: Path) -> None:
    first, second = Runner(), Runner()
    search(tmp_path / "a").run(first)
    search(tmp_path / "b").run(second)
    assert first.points == second.points


def test_a_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first, second, third = Runner(), Runner(), Runner()
    search(tmp_path, n_trials=4).run(first)
    results = search(tmp_path, n_trials=6).run(second).results
    assert (len(first.points), len(second.points), len(results.points)) == (4, 2, 6)
    assert not any(point in first.points for point in second.points)  # the seed is not drawn from again
    search(tmp_path, n_trials=6).run(third)
    assert third.points == []


@pytest.mark.parametrize("order", [KeyboardInterrupt, SystemExit])
def test_a_point_that_was_interrupted_is_run_again(tmp_path: Path, order: type[BaseException]) -> None:
    def stop(point: Mapping[str, Any]) -> tuple[float, ...]:
        if len(first.points) == 3:
            raise order
        return parabola(point)

    first, second = Runner(stop), Runner()
    with pytest.raises(order):
        search(tmp_path).run(first)
    results = search(tmp_path).run(second).results
    assert second.points[0] == first.points[2]
    assert len(second.points) == 4
    assert [point.state for point in results.points] == ["completed"] * 6
    assert [point.repeats for point in results.points if point.repeats is not None] == [2]


def test_failed_trials_are_told_and_the_search_goes_on(tmp_path: Path) -> None:
    def fragile(point: Mapping[str, Any]) -> tuple[float, ...]:
        match len(runner.points):
            case 2:
                raise ArithmeticError("the metric is singular")
            case 3:
                return (math.nan,)
            case 4:
                return (1.0, 2.0)
        return parabola(point)

    runner = Runner(fragile)
    results = search(tmp_path).run(runner).results
    assert [point.state for point in results.points] == ["completed", *["failed"] * 3, "completed", "completed"]
    errors = [row["error"] for row in rows(tmp_path) if row["error"]]
    assert errors[0] == "the metric is singular"
    assert "not a number" in errors[1] and "returned 2 objectives, direction asks for 1" in errors[2]
    assert [t.state.name for t in trials(tmp_path)].count("FAIL") == 3


def test_too_many_failures_end_the_search(tmp_path: Path) -> None:
    def broken(point: Mapping[str, Any]) -> tuple[float, ...]:
        raise ArithmeticError("no such matrix")

    runner = Runner(broken)
    with pytest.raises(SearchError, match=r"3 trials failed.*max_failure_rate=0\.25 of 10.*no such matrix"):
        conclude(search(tmp_path, n_trials=10, max_failure_rate=0.25), runner)
    assert len(runner.points) == 3
    # What was wrong may be mended: the failures of before do not count against a new start.
    assert len(search(tmp_path, n_trials=10, max_failure_rate=0.25).run(Runner()).results.completed) == 7


def test_a_search_without_a_completed_trial_is_an_error(tmp_path: Path) -> None:
    def broken(point: Mapping[str, Any]) -> tuple[float, ...]:
        raise ArithmeticError("no")

    with pytest.raises(SearchError, match="No trial of study 'study' was completed"):
        conclude(search(tmp_path, n_trials=2, max_failure_rate=1.0), Runner(broken))


@pytest.mark.parametrize("kind", ["brute_force", "grid"])
def test_every_combination_once(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    space = {"n": IntDistribution(0, 2), "c": CategoricalDistribution(("a", "b"))}
    with pytest.warns(optuna.exceptions.ExperimentalWarning) if kind == "brute_force" else _nothing():
        sampler = BruteForceSampler(seed=0) if kind == "brute_force" else GridSampler({"n": [0, 1, 2], "c": ["a", "b"]})
    runner, again = Runner(lambda point: (point["n"],)), Runner()
    search(tmp_path, n_trials=50, distributions=space, sampler=sampler).run(runner)
    assert sorted((p["n"], p["c"]) for p in runner.points) == [(n, c) for n in range(3) for c in "ab"]
    assert "Every combination was tried" in capsys.readouterr().err
    search(tmp_path, n_trials=50, distributions=space, sampler=sampler).run(again)
    assert again.points == []


def _nothing() -> Any:
    return pytest.MonkeyPatch.context()


@pytest.mark.parametrize(
    ("sampler", "directions"),
    [
        (TPESampler(seed=0, n_startup_trials=2), 1),
        (TPESampler(seed=0, n_startup_trials=2), 2),
        (GPSampler(seed=0, n_startup_trials=2), 1),
        (CmaEsSampler(seed=0, warn_independent_sampling=False), 1),
        (NSGAIISampler(seed=0, population_size=3), 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseSampler) else str(value),
)
def test_samplers_learn_from_what_they_are_told(tmp_path: Path, sampler: Any, directions: int) -> None:
    runner = Runner(lambda point: (*parabola(point), point["x"])[:directions])
    names = ("loss", "x")[:directions]
    one = search(tmp_path, directions=("minimize",) * directions, objectives=names, sampler=sampler)
    assert len(one.run(runner).results.completed) == 6


@pytest.mark.parametrize(
    ("sampler", "directions"), [("brute", ("minimize",)), (CmaEsSampler(seed=0), ("minimize", "minimize"))]
)
def test_a_sampler_that_cannot_search_the_space_is_refused_before_there_is_a_study(
    tmp_path: Path, sampler: Any, directions: tuple[str, ...]
) -> None:
    if sampler == "brute":
        with pytest.warns(optuna.exceptions.ExperimentalWarning):
            sampler = BruteForceSampler()
    names = ("loss", "size")[: len(directions)]
    with pytest.raises(ConfigError, match=r"sampler: \w+Sampler cannot search this space.*sampler=tpe"):
        search(tmp_path, sampler=sampler, directions=directions, objectives=names).run(Runner())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"model": "demo", "seed": 0}}, r"model: tiny in the study, demo now"),
        ({"settings": {"model": "tiny"}}, r"seed: 0 in the study, absent now"),
        ({"directions": ("maximize",)}, r"directions: \['minimize'\] in the study, \['maximize'\] now"),
        ({"objectives": ("speed",)}, r"objectives: \['loss'\] in the study, \['speed'\] now"),
        (
            {"distributions": {"x": FloatDistribution(0, 1)}},
            r"x: -1.0 to 1.0 in the study, 0.0 to 1.0 now\s+n: .*absent",
        ),
    ],
)
@pytest.mark.parametrize("place", ["same folder", "same folder, another name", "same storage"])
def test_a_study_of_another_search_is_refused(
    tmp_path: Path, place: str, changes: dict[str, Any], message: str
) -> None:
    storage = str(tmp_path / "study.journal")
    search(tmp_path, n_trials=1).run(Runner())
    before, runner = contents(tmp_path), Runner()
    folder = tmp_path / "new" if place == "same storage" else tmp_path
    # A name is made of the settings where none is given: then the storage has no study of that name.
    name = "other" if "name" in place else "study"
    with pytest.raises(SearchError, match=rf"(?s)belongs to another search.*{message}.*study_name=NEW"):
        search(folder, storage=storage, study_name=name, **changes).run(runner)
    assert runner.points == []
    assert contents(tmp_path) == before
    assert contents(tmp_path / "new") == {}
    # There is room for it elsewhere, and the first one goes on.
    elsewhere = search(tmp_path / "new", storage=storage, study_name="other", n_trials=1, **changes)
    assert len(elsewhere.run(Runner(lambda point: (point["x"],))).results.completed) == 1
    assert len(search(tmp_path, n_trials=2).run(Runner()).results.points) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study_name": "other"}, r"study_name: study in the folder, other now"),
        ({"storage": "sqlite:///{}/study.db"}, r"storage: study.journal in the folder, sqlite:///.*study.db now"),
        ({"storage": None}, r"storage: study.journal in the folder, memory now"),
    ],
)
def test_a_folder_holds_one_study(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """The same search under another name, or in another storage, would begin anew and write over the tables."""
    search(tmp_path, n_trials=1).run(Runner())
    before = contents(tmp_path)
    changes = {key: value and value.format(tmp_path) for key, value in changes.items()}
    with pytest.raises(SearchError, match=rf"(?s){tmp_path} belongs to another search.*{message}.*sweep\.dir=NEW"):
        search(tmp_path, **changes).run(Runner())
    assert contents(tmp_path) == before


@pytest.mark.parametrize("scheme", ["", "sqlite:///"], ids=["journal", "sqlite"])
def test_a_folder_may_be_moved(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "a").mkdir()
    search(tmp_path / "a", n_trials=1, storage=f"{scheme}{tmp_path}/a/study").run(Runner())
    (tmp_path / "a").rename(tmp_path / "b")
    again = search(tmp_path / "b", n_trials=2, storage=f"{scheme}{tmp_path}/b/study").run(Runner())
    assert len(again.results.completed) == 2


def test_a_folder_that_does_not_say_whose_it_is(tmp_path: Path) -> None:
    search(tmp_path, n_trials=1).run(Runner())
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(SearchError, match=r"study\.json does not say whose results lie there"):
        search(tmp_path, n_trials=2).run(Runner())


def test_a_study_that_nobody_signed_is_refused(tmp_path: Path) -> None:
    study = optuna.create_study(study_name="study", storage=stored(tmp_path))
    study.tell(study.ask(), 1.0)
    with pytest.raises(SearchError, match="was not made by this program"):
        search(tmp_path).run(Runner())


def test_more_trials_or_another_sampler_are_the_same_search(tmp_path: Path) -> None:
    search(tmp_path, n_trials=2).run(Runner())
    results = search(tmp_path, n_trials=4, sampler=TPESampler(n_startup_trials=1)).run(Runner()).results
    assert len(results.completed) == 4


@pytest.mark.parametrize("kind", ["journal", pytest.param("sqlite", marks=pytest.mark.slow)])
def test_two_processes_on_one_study(tmp_path: Path, kind: str) -> None:
    """Together they run every trial once, both take part, and neither draws the other's points."""
    storage = str(tmp_path / "study.journal") if kind == "journal" else f"sqlite:///{tmp_path}/study.db"
    start = PROCESSES.Event()
    arguments = (str(tmp_path), storage, 9, 0.15, start)
    processes = [PROCESSES.Process(target=work, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    ran = [(path.name.split("-")[1], path.read_text()) for path in tmp_path.glob("ran-*")]
    assert {int(process) for process, _ in ran} == {process.pid for process in processes}
    assert len(ran) == 9 == len({x for _, x in ran})
    assert len(search(tmp_path, storage=storage, n_trials=9).run(Runner()).results.completed) == 9


def test_what_a_killed_process_ran_is_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 in the middle of a trial: its point, and no other, is run again."""
    start = PROCESSES.Event()
    start.set()
    process = PROCESSES.Process(target=work, args=(str(tmp_path), str(tmp_path / "study.journal"), 4, 3600.0, start))
    process.start()
    end = time.monotonic() + 60
    while not (ran := list(tmp_path.glob("ran-*"))) or not ran[0].read_text():
        assert time.monotonic() < end and process.is_alive()
        time.sleep(0.02)
    # Alive, it keeps its trial: another process takes the others.
    beside = Runner()
    search(tmp_path, n_trials=4).run(beside)
    assert len(beside.points) == 3
    assert "note: under way elsewhere, of 4 trials: 1." in capsys.readouterr().err
    process.kill()
    process.join(10)
    runner = Runner()
    results = search(tmp_path, n_trials=4).run(runner).results
    assert [repr(point["x"]) for point in runner.points] == [ran[0].read_text()]
    assert "trial 0: its process ended before it did; its point is run again" in capsys.readouterr().err
    assert [(p.state, p.repeats) for p in results.points] == [("completed", None)] * 3 + [("completed", 0)]


def test_a_result_that_comes_too_late_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another process has given the trial up meanwhile, and has run its point itself."""

    def slow(point: Mapping[str, Any]) -> tuple[float, ...]:
        if len(runner.points) == 1:
            study = optuna.load_study(study_name="study", storage=stored(tmp_path))
            study.tell(0, state=optuna.trial.TrialState.FAIL)
        return parabola(point)

    runner = Runner(slow)
    results = search(tmp_path, n_trials=3).run(runner).results
    assert "trial 0 was given up by another process" in capsys.readouterr().err
    assert [point.state for point in results.points] == ["failed", "completed", "completed"]


def test_progress_is_one_line_per_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search(tmp_path, n_trials=3).run(Runner())
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("3 trials; 2 parameters, RandomSampler")
    assert [line.split("]")[0] for line in lines[1:]] == ["[1/3", "[2/3", "[3/3"]
    assert "trial 0: loss " in lines[1] and "best " in lines[1] and "2 left, about " in lines[1]
    assert lines[3].endswith("; none left")


def test_memory_leaves_nothing_but_tables(tmp_path: Path) -> None:
    conclude(search(tmp_path, storage=None, n_trials=2), Runner())
    assert contents(tmp_path).keys() == {"trials.csv", "best.yaml", "history.png", "history.svg", "study.json"}


def test_a_line_that_a_process_died_in_is_cut_off(tmp_path: Path) -> None:
    search(tmp_path, n_trials=3).run(Runner())
    with (tmp_path / "study.journal").open("a") as file:
        file.write('{"op_code":5,"wor')
    assert len(search(tmp_path, n_trials=5).run(Runner()).results.completed) == 5


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "study.journal"
    file.write_text("my notes, without an end of line")
    with pytest.raises(SearchError, match=r"is a file, but no journal of a study.*sqlite:///"):
        search(tmp_path).run(Runner())
    assert file.read_text() == "my notes, without an end of line"


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("oracel://x/y", r"hydra\.sweeper\.storage is no URL of a database.*postgresql://"),
        ("journal:", r"hydra\.sweeper\.storage must be a file"),
        ("sqlite:////proc/no/such.db", r"/proc/no/such\.db cannot be made"),
        ("/proc/no/study.journal", r"/proc/no/study\.journal cannot be made"),
    ],
)
def test_a_storage_that_is_none(tmp_path: Path, storage: str, message: str) -> None:
    with pytest.raises((ConfigError, SearchError), match=message):
        search(tmp_path, storage=storage).run(Runner())


def test_a_storage_that_is_lost_on_the_way_is_an_error_that_says_so(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"

    def lose(point: Mapping[str, Any]) -> tuple[float, ...]:
        with sqlite3.connect(tmp_path / "study.db") as database:
            database.execute("DROP TABLE trial_values")
        return parabola(point)

    with pytest.raises(
        SearchError, match=r"does not answer any more: no such table: trial_values\. Its trials are kept"
    ):
        search(tmp_path, storage=storage).run(Runner(lose))


def test_passwords_are_not_shown() -> None:
    with pytest.raises(SearchError) as caught:
        open_storage(
            "postgresql+pg8000://ann:secret@host/db", setting="hydra.sweeper.storage"
        )  # a driver that nothing here needs
    assert "pg8000" in str(caught.value) and "secret" not in str(caught.value)
    assert shown("postgresql://ann:secret@host/db") == "postgresql://ann:***@host/db"
    assert shown("journal:a/b") == shown("a/b") == "a/b"


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        ({"n_trials": 0}, r"n_trials must be a whole number of at least 1, got 0"),
        ({"n_jobs": -1}, r"n_jobs must be a whole number of at least 1, got -1"),
        ({"directions": ("down",)}, r"direction must be minimize or maximize, or a list of these, got \['down'\]"),
        ({"directions": ()}, r"direction must be minimize or maximize"),
        ({"max_failure_rate": 1.5}, r"max_failure_rate must be between 0 .* and 1 .*got 1.5"),
        ({"study_name": ""}, r"study_name is empty"),
    ],
)
def test_settings_out_of_range(slip: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "n_trials": 3, "n_jobs": 1, "directions": ("minimize",), "storage": None, "study_name": "s",
        "max_failure_rate": 0.2,
    }  # fmt: skip
    SearchSettings(**good)
    with pytest.raises(ConfigError, match=message):
        SearchSettings(**{**good, **slip})


def test_a_front_is_saved(tmp_path: Path) -> None:
    two = search(tmp_path, directions=("minimize", "maximize"), objectives=("loss", "speed"), n_trials=8)
    results = conclude(two, Runner(lambda point: (abs(point["x"]), point["n"])))
    assert {path.name for path in tmp_path.iterdir()} >= {"front.json", "front.csv", "front.png", "front.svg"}
    front = json.loads((tmp_path / "front.json").read_text())
    assert front["objectives"] == {"loss": "minimize", "speed": "maximize"}
    assert [tuple(entry["values"].values()) for entry in front["front"]] == [point.values for point in results.best]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("UPDATE trial_values SET value = value + 1e-9 WHERE trial_id = 2", "trial 1 is not what was stored"),
        ("UPDATE trial_params SET param_value = 0.5 WHERE trial_id = 1 AND param_name = 'x'", "trial 0 is not what"),
        (
            "UPDATE trial_params SET distribution_json = replace(distribution_json, '3', '4') WHERE param_name = 'n'",
            "trial 0 is not what was stored",
        ),
        ("DELETE FROM trials WHERE number = 1", "trial 1 is missing"),
        ("UPDATE trial_user_attributes SET value_json = '{' || value_json", "is damaged .*JSONDecodeError"),
        ("UPDATE trials SET state = 'COMPLEDE'", "is damaged .*LookupError"),
    ],
)
def test_a_damaged_database_is_refused(tmp_path: Path, change: str, message: str) -> None:
    place = f"sqlite:///{tmp_path}/study.db"
    search(tmp_path, n_trials=3, storage=place).run(Runner())
    search(tmp_path, n_trials=3, storage=place).run(Runner())
    with closing(sqlite3.connect(tmp_path / "study.db")) as base, base:
        base.execute(change)
    with pytest.raises(SearchError, match=message):
        search(tmp_path, n_trials=3, storage=place).run(Runner())
