"""Searches whose processes are killed, or run out of disk space: every point is run, once, whoever died when."""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from bs_exp.errors import SearchError
from bs_exp.search.storage import open_storage
from tests.support.searches import GRID, Runner, enumerate_all, files_no_larger_than, search, take_part

# A server that has imported everything forks the workers, so that a hundred of them cost little.
WORKERS = multiprocessing.get_context("forkserver")
WORKERS.set_forkserver_preload(["tests.support.searches"])
POINTS = {(n, c): (float(n),) for n in range(3) for c in "ab"}


def start(folder: Path, kind: str, *, n_trials: int = 6, seconds: float = 0.0, dies_at: int = 0) -> BaseProcess:
    process = WORKERS.Process(target=take_part, args=(str(folder), kind, n_trials, seconds, dies_at))
    process.start()
    return process


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = open_storage(str(folder / "study.journal"), setting="storage")
    return optuna.load_study(study_name="study", storage=storage).trials


def check_complete(folder: Path, kind: str, n_trials: int = 6) -> None:
    """The search is over: as many points as it should have, under enumeration each of the grid once."""
    completed = [trial for trial in trials(folder) if trial.state is TrialState.COMPLETE]
    assert all(trial.state.is_finished() for trial in trials(folder))
    assert len(completed) == n_trials
    if kind != "tpe":
        found = Counter((trial.params["n"], trial.params["c"], *trial.values) for trial in completed)
        assert found == Counter((*point, *values) for point, values in POINTS.items())


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("brute force", 6),
        *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in ("brute force", "grid", "tpe")),
    ],
)
def test_killed_in_any_write_and_started_again(tmp_path: Path, kind: str, step: int) -> None:
    """The second process finds half a line at the end of the journal, and ends the search."""
    for dies_at in range(1, 200, step):
        folder = tmp_path / str(dies_at)
        killed = start(folder, kind, dies_at=dies_at)
        killed.join(60)
        if killed.exitcode == 0:
            break
        assert killed.exitcode == -9
        runner = Runner(lambda point: (point["n"],))
        sampler = enumerate_all(kind)
        search(folder, n_trials=6, distributions=GRID, sampler=sampler, settings={"seed": 0}).run(runner)
        check_complete(folder, kind)
        again = Runner()
        n_trials = 6 if kind == "tpe" else 9
        search(folder, n_trials=n_trials, distributions=GRID, sampler=sampler, settings={"seed": 0}).run(again)
        assert again.points == []
    assert dies_at > 40


@pytest.mark.parametrize("kind", ["brute force", pytest.param("grid", marks=pytest.mark.slow)])
def test_killed_while_it_takes_over_what_a_killed_one_left(tmp_path: Path, kind: str) -> None:
    for dies_at in range(1, 10):
        folder = tmp_path / str(dies_at)
        # The first is killed when it stores what its second trial found, the second in one of its first writes.
        for write in (18, dies_at):
            killed = start(folder, kind, dies_at=write)
            killed.join(60)
            assert killed.exitcode == -9
        sampler = enumerate_all(kind)
        search(folder, n_trials=6, distributions=GRID, sampler=sampler, settings={"seed": 0}).run(
            Runner(lambda point: (point["n"],))
        )
        check_complete(folder, kind)


@pytest.mark.parametrize("kind", ["brute force", "grid", "tpe"])
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_at_once_run_every_point_once(tmp_path: Path, kind: str, workers: int) -> None:
    processes = [start(tmp_path, kind, seconds=0.05) for _ in range(workers)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * workers
    check_complete(tmp_path, kind)
    assert len(list(tmp_path.glob("ran-*"))) == 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["brute force", "grid", "tpe"])
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_that_are_killed_and_started_again(tmp_path: Path, kind: str, workers: int) -> None:
    """Each is killed in a random write, many times over; nothing waits for a process that is dead."""
    draw = random.Random(workers)
    kills, campaigns = 0, 8
    for campaign in range(campaigns):
        folder = tmp_path / str(campaign)
        processes = [start(folder, kind, dies_at=draw.randint(1, 25)) for _ in range(workers)]
        end = time.monotonic() + 60
        while any(process.exitcode != 0 for process in processes):
            assert time.monotonic() < end
            for i, process in enumerate(processes):
                process.join(0.02)
                if process.exitcode not in (None, 0):
                    assert process.exitcode == -9
                    kills += 1
                    processes[i] = start(folder, kind, dies_at=draw.choice([0, draw.randint(1, 25)]))
        last = start(folder, kind)  # what was under way when the others ended
        last.join(60)
        assert last.exitcode == 0
        check_complete(folder, kind)
    assert kills >= campaigns


def study_of_three(folder: Path) -> bytes:
    """The journal of a search of three trials."""
    search(folder, n_trials=3).run(Runner())
    return (folder / "study.journal").read_bytes()


def test_any_end_that_a_killed_writer_leaves(tmp_path: Path) -> None:
    whole = study_of_three(tmp_path)
    before, last = whole[: whole[:-1].rfind(b"\n") + 1], whole[whole[:-1].rfind(b"\n") + 1 :]
    states = [trial.state for trial in trials(tmp_path)]
    for length in range(1, len(last), 7):
        (tmp_path / "study.journal").write_bytes(before + last[:length])
        storage = open_storage(str(tmp_path / "study.journal"), setting="storage")
        study = optuna.load_study(study_name="study", storage=storage)
        study.set_user_attr("mended", length)
        content = (tmp_path / "study.journal").read_bytes()
        assert content.startswith(before) and content.endswith(b"\n")
        assert [json.loads(line)["op_code"] for line in content.splitlines()]
        assert len(trials(tmp_path)) == len(states)


def test_a_journal_whose_first_line_was_not_finished(tmp_path: Path) -> None:
    first = study_of_three(tmp_path / "a").split(b"\n")[0]
    for length in (0, 1, 5, 12, len(first) - 1):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / "study.journal").write_bytes(first[:length])
        assert len(search(folder, n_trials=2).run(Runner()).results.completed) == 2


def test_lines_that_were_glued_together_are_taken_apart(tmp_path: Path) -> None:
    """Half a line, from a full disk, and the whole line that another process wrote behind it: the second is kept."""
    lines = study_of_three(tmp_path).splitlines(keepends=True)
    expected = [(trial.state, trial.params, trial.values) for trial in trials(tmp_path)]
    for i in range(1, len(lines)):
        half = lines[-1][: 10 + 3 * i]
        (tmp_path / "study.journal").write_bytes(b"".join([*lines[:i], half, half[:14], *lines[i:]]))
        assert [(trial.state, trial.params, trial.values) for trial in trials(tmp_path)] == expected
        assert (tmp_path / "study.journal").read_bytes() == b"".join(lines)


def test_a_line_that_was_changed_is_no_unfinished_one(tmp_path: Path) -> None:
    """It is not left out: later lines would mean other trials."""
    lines = study_of_three(tmp_path).splitlines(keepends=True)
    lines[4] = lines[4].replace(b"}", b")")
    (tmp_path / "study.journal").write_bytes(b"".join(lines))
    with pytest.raises(SearchError, match=r"study\.journal is damaged.*Move it away"):
        search(tmp_path, n_trials=4).run(Runner())
    assert (tmp_path / "study.journal").read_bytes() == b"".join(lines)


def test_a_flipped_bit_in_any_line_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    whole = study_of_three(tmp_path)
    expected = [(trial.state, trial.params, trial.values) for trial in trials(tmp_path)]
    draw, noticed = random.Random(0), 0
    for _ in range(200):
        place = draw.randrange(len(whole))
        flipped = whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]
        (tmp_path / "study.journal").write_bytes(flipped)
        try:
            assert [(trial.state, trial.params, trial.values) for trial in trials(tmp_path)] == expected
        except SearchError:
            noticed += 1
    assert noticed > 150


def test_lines_without_a_checksum_are_read(tmp_path: Path) -> None:
    """Those of earlier versions, and of Optuna itself."""
    lines = study_of_three(tmp_path).splitlines()
    expected = [(trial.state, trial.params, trial.values) for trial in trials(tmp_path)]
    for line in lines:
        assert re.fullmatch(rb'\{"op_code":.*,"crc32":"[0-9a-f]{8}"\}', line)
    older = [re.sub(rb',"crc32":"[0-9a-f]{8}"\}$', b"}", line) + b"\n" for line in lines]
    (tmp_path / "study.journal").write_bytes(b"".join(older))
    assert [(trial.state, trial.params, trial.values) for trial in trials(tmp_path)] == expected


def test_a_full_disk_under_two_workers(tmp_path: Path) -> None:
    """One fails in the middle of a line; the other, which was there before, writes on when there is space again."""
    whole = study_of_three(tmp_path)
    first, second = (
        optuna.load_study(study_name="study", storage=open_storage(str(tmp_path / "study.journal"), setting="storage"))
        for _ in range(2)
    )
    with files_no_larger_than(len(whole) + 20), pytest.raises(StorageInternalError, match=r"study\.journal"):
        first.set_user_attr("note", "lost")
    assert len((tmp_path / "study.journal").read_bytes()) == len(whole) + 20
    second.set_user_attr("other", "kept")
    assert first.user_attrs == second.user_attrs and first.user_attrs["other"] == "kept"
    assert (tmp_path / "study.journal").read_bytes().startswith(whole)
    assert len(search(tmp_path, n_trials=5).run(Runner()).results.completed) == 5


def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path) -> None:
    whole = study_of_three(tmp_path)
    with files_no_larger_than(len(whole) + 100), pytest.raises(SearchError, match=r"not answer any more: .*large"):
        search(tmp_path, n_trials=5).run(Runner())
    assert len(search(tmp_path, n_trials=5).run(Runner()).results.completed) == 5


@pytest.mark.parametrize("kind", ["brute force", "grid", "tpe"])
@pytest.mark.parametrize("place", ["{}/study.journal", "sqlite:///{}/study.db"])
@pytest.mark.parametrize("parameters", [0, 1, 2])
def test_a_trial_whose_process_died_before_it_signed_it(
    tmp_path: Path, kind: str, place: str, parameters: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has none, some or all of its parameters; nobody waits for it, and no other point is lost with it."""
    place = place.format(tmp_path)

    def go_on(n_trials: int) -> list[str]:
        sampler = enumerate_all(kind)
        one = search(
            tmp_path, storage=place, n_trials=n_trials, distributions=GRID, sampler=sampler, settings={"seed": 0}
        )
        return [point.state for point in one.run(Runner(lambda point: (point["n"],))).results.points]

    go_on(2)
    storage = open_storage(place, setting="storage")
    study = optuna.load_study(study_name="study", storage=storage, sampler=enumerate_all(kind))
    study.ask(dict(list(GRID.items())[:parameters]))
    assert go_on(6) == ["completed"] * 6
    assert "trial 2: its process ended before it did; its point is run again" in capsys.readouterr().err
    trials = optuna.load_study(study_name="study", storage=storage).trials
    assert len(trials) == 6
    if kind != "tpe":
        assert {(trial.params["n"], trial.params["c"]) for trial in trials} == POINTS.keys()
