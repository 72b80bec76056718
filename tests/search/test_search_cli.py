"""Searches by the command line: real runs of a tiny model, nothing in between."""

from __future__ import annotations

import csv
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from bs_exp.records.record import Status, read_record
from bs_exp.search.search import ignoring_experimental

Cli = Callable[..., Any]
Tiny = tuple[str, ...]
ROOT = Path(__file__).parents[2]
FOLDER = Path("outputs/sweeps/s")


@pytest.fixture
def searching(tiny: Tiny) -> tuple[str, ...]:
    """Settings of a search of two parameters, in a folder with a short name."""
    return (
        "-m",
        "hydra/sweeper=optuna",
        *tiny,
        "sharing=none",
        "allocation=manual",
        "allocation.by_depth.0=interval(0.5,2)",
        "retain_ratio=range(0.5,0.8,0.1)",
        f"hydra.sweep.dir={FOLDER}",
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.study_name=study",
    )


def rows(folder: Path = FOLDER) -> list[dict[str, str]]:
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_trial_that_repeats_settings_is_not_paid_twice(cli: Cli, searching: Tiny) -> None:
    settings = [s for s in searching if not s.startswith(("allocation", "retain_ratio"))]
    random = ("retain_ratio=choice(0.8,0.5)", "hydra/sweeper/sampler=random", "hydra.sweeper.n_trials=4")
    done = cli(*settings, *random)
    assert done.status == 0, done.err
    trials = rows()
    assert len(trials) == 4  # of two settings: two of them at least are repeated
    folders = {row["folder"]: row["ppl/text"] for row in trials}
    assert len(folders) == len({row["retain_ratio"] for row in trials}) <= 2
    assert all(row["ppl/text"] == folders[row["folder"]] for row in trials)
    repeated = [
        float(row["seconds"]) for i, row in enumerate(trials) if row["folder"] in [r["folder"] for r in trials[:i]]
    ]
    assert len(list(FOLDER.glob("*/record.json"))) == len(folders) and len(repeated) >= 2
    study = optuna.load_study(
        study_name="study", storage=JournalStorage(JournalFileBackend(str(FOLDER / "study.journal")))
    )
    with ignoring_experimental():
        assert study.metric_names == ["ppl/text"]


@pytest.mark.slow
def test_search_and_its_best_point_again(cli: Cli, searching: Tiny) -> None:
    done = cli(*searching)
    assert done.status == 0, done.err
    assert [line.split("]")[0] for line in done.err.splitlines() if line.startswith("[")] == [
        f"[{number}/3" for number in range(1, 4)
    ]
    trials = rows()
    assert [row["state"] for row in trials] == ["completed"] * 3
    for row in trials:
        record = read_record(FOLDER / row["folder"])
        assert record.status is Status.COMPLETED
        assert record.objective == float(row["ppl/text"])
        assert record.config["retain_ratio"] == float(row["retain_ratio"])
        assert record.config["allocation"]["by_depth"][0] == float(row["allocation.by_depth.0"])
    (best,) = yaml.safe_load((FOLDER / "best.yaml").read_text())
    assert best["values"]["ppl/text"] == min(float(row["ppl/text"]) for row in trials)
    assert best["command"] in done.out

    again = cli(*best["overrides"], "hydra.run.dir=again")
    assert again.status == 0, again.err
    assert read_record(Path("again")).objective == best["values"]["ppl/text"]
    assert read_record(Path("again")).config_hash == read_record(FOLDER / best["folder"]).config_hash

    kept = cli(*searching)
    assert kept.status == 0 and "goes on, 3 of 3 trials done" in kept.err
    more = cli(*searching, "hydra.sweeper.n_trials=4")
    assert more.status == 0 and "goes on, 3 of 4 trials done" in more.err
    assert [row["state"] for row in rows()] == ["completed"] * 4
    refused = cli(*searching, "sharing=paper")
    assert refused.status == 1
    assert "belongs to another search" in refused.err
    assert "sharing.group_size: absent in the study, 2 now" in refused.err
    assert "Traceback" not in refused.err


def test_front_of_perplexity_and_bytes(cli: Cli, searching: Tiny) -> None:
    done = cli(
        *searching,
        "objective=[ppl/text,size/bytes]",
        "hydra.sweeper.direction=[minimize,minimize]",
        "hydra/sweeper/sampler=nsga2",
    )
    assert done.status == 0, done.err
    front = json.loads((FOLDER / "front.json").read_text())
    assert front["objectives"] == {"ppl/text": "minimize", "size/bytes": "minimize"}
    points = {row["trial"]: (float(row["ppl/text"]), float(row["size/bytes"])) for row in rows()}
    undominated = {
        trial
        for trial, (ppl, size) in points.items()
        if not any(p <= ppl and s <= size and (p, s) != (ppl, size) for p, s in points.values())
    }
    assert {str(entry["trial"]) for entry in front["front"]} == undominated
    record = read_record(FOLDER / front["front"][0]["folder"])
    assert record.objective == {
        "ppl/text": record.metrics["compressed"]["ppl/text"],
        "size/bytes": record.size["bytes"],
    }
    assert (FOLDER / "front.svg").read_text().count("Pareto front") >= 1
    assert (FOLDER / "front.csv").exists() and (FOLDER / "front.png").exists()


@pytest.mark.slow
def test_parameters_belong_to_their_options_and_failures_to_the_search(cli: Cli, searching: Tiny) -> None:
    """Every option that the model allows is tried; a group of five layers does not fit and fails."""
    done = cli(
        *(setting for setting in searching if not setting.startswith(("allocation", "sharing", "retain_ratio"))),
        "sharing=choice(none,paper)",
        "sharing.group_size=choice(2,5)",
        "hydra/sweeper/sampler=grid",
        "hydra.sweeper.n_trials=9",
        "hydra.sweeper.max_failure_rate=0.5",
    )
    assert done.status == 0, done.err
    tried = [(row["sharing"], row["sharing.group_size"], row["state"]) for row in rows()]
    assert sorted(tried) == [
        ("none", "", "completed"), ("none", "", "completed"), ("paper", "2", "completed"), ("paper", "5", "failed"),
    ]  # fmt: skip
    assert "group_size must be between 1 and 3" in done.out
    assert "Every combination was tried" in done.err


def test_another_search_does_not_write_over_the_first(cli: Cli, searching: Tiny) -> None:
    """Without a name of its own, a study is named by its settings: other settings, another study in the folder."""
    first = [setting for setting in searching if not setting.startswith("hydra.sweeper.study_name")]
    assert cli(*first, "hydra.sweeper.n_trials=1").status == 0
    before = {path.name: path.read_bytes() for path in FOLDER.glob("[!.]*") if path.is_file() and path.stem != "sweep"}
    assert before.keys() >= {"best.yaml", "trials.csv", "study.journal"}
    refused = cli(*first, "allocation.by_depth.1=interval(0.5,2)", "hydra.sweeper.n_trials=1")
    assert refused.status == 1
    assert f"{FOLDER} belongs to another search" in refused.err
    assert "allocation.by_depth.1: absent in the study, 0.5 to 2.0 now" in refused.err
    assert "hydra.sweep.dir=NEW" in refused.err and "Traceback" not in refused.err
    for name, content in before.items():
        assert (FOLDER / name).read_bytes() == content


@pytest.mark.parametrize(
    ("slips", "message"),
    [
        (["hydra.sweeper.n_trials=0"], "error: hydra.sweeper: n_trials must be a whole number of at least 1, got 0"),
        (
            ["hydra.sweeper.direction=[minimize,minimize]"],
            "names 2 directions (minimize, minimize), and the run returns",
        ),
        (["hydra/sweeper/sampler=tpee"], "error: hydra/sweeper/sampler=tpee does not exist. Did you mean tpe?"),
        (["hydra/sweeper/sampler=grid"], "BruteForceSampler cannot search this space"),
        (["retain_ratoi=interval(0,1)"], "error: retain_ratoi does not exist. Did you mean retain_ratio?"),
        (["sharing=choice(none,papre)"], "error: sharing=papre does not exist. Did you mean paper?"),
        (["importance.p=interval(0,1)"], "error: importance.p does not exist"),
    ],
)
def test_slip_stops_before_there_is_a_study(cli: Cli, searching: Tiny, slips: list[str], message: str) -> None:
    Path("outputs").mkdir()
    done = cli(*searching, *slips)
    assert done.status == 1
    assert message in done.err
    assert "Traceback" not in done.err
    assert not list(FOLDER.glob("study.*")) and not list(FOLDER.glob("*/record.json"))


def test_a_default_objective_that_the_direction_would_make_worse_is_refused(cli: Cli, searching: Tiny) -> None:
    """Without logits the default objective is a cosine, of which higher is better; the default direction minimises."""
    encoder = ["model.family=bert", "evaluation=similarity", "evaluation.sequence_length=64"]
    kept = [s for s in searching if not s.startswith(("evaluation", "hydra.sweeper.n_trials"))]
    done = cli(*kept, *encoder, "hydra.sweeper.n_trials=1", "calibration.sequence_length=32")
    assert done.status == 1
    wanted = "objective is null, so the run returned cosine/python_docs, which hydra.sweeper.direction=minimize"
    assert wanted in done.err + done.out
    assert "Set objective=cosine/python_docs and hydra.sweeper.direction=maximize." in done.err + done.out


@pytest.mark.slow
def test_the_sweep_file_searches_ranks(cli: Cli, tiny: Tiny) -> None:
    done = cli(
        "sweeps=rank_search", *tiny, "sharing.group_size=choice(1,2)", "retain_ratio=0.6",
        f"hydra.sweep.dir={FOLDER}", "hydra.sweeper.n_trials=3",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert [row["state"] for row in rows()] == ["completed"] * 3
    for row in rows():
        config = read_record(FOLDER / row["folder"]).config
        assert config["importance"]["a"] == float(row["importance.a"])
        assert bool(row["allocation.beta"]) == (row["allocation"] == "dipsvd_heuristic")


def start(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bs_exp", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_commands_at_once_share_a_study(searching: Tiny, tmp_path: Path) -> None:
    commands = [start(*searching, "hydra.sweeper.n_trials=8", folder=tmp_path) for _ in range(2)]
    ended = [command.communicate(timeout=200) for command in commands]
    assert [command.returncode for command in commands] == [0, 0], ended
    trials = rows(tmp_path / FOLDER)
    assert [row["state"] for row in trials] == ["completed"] * 8
    ran = {read_record(tmp_path / FOLDER / row["folder"]).process for row in trials}
    assert ran <= {command.pid for command in commands}


@pytest.fixture
def postgresql() -> Iterator[str]:
    """The URL of an empty database in a cluster of its own; skipped where PostgreSQL or its driver is not installed."""
    pytest.importorskip("psycopg")
    places = [Path(found).parent] if (found := shutil.which("initdb")) else Path("/usr/lib/postgresql").glob("*/bin")
    programs = max(places, default=None)
    # It does not run as root; its package brings a user.
    user = "postgres" if os.geteuid() == 0 else None
    if programs is None or (user and user not in {entry.pw_name for entry in pwd.getpwall()}):
        pytest.skip("PostgreSQL is not installed")
    folder = Path(tempfile.mkdtemp(prefix="bs_exp-postgresql-"))  # short: the name of its socket is limited
    if user:
        shutil.chown(folder, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(program: str, *arguments: str) -> None:
        command = [str(programs / program), "-D", str(folder / "data"), *arguments]
        done = subprocess.run(command, cwd=folder, user=user, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr

    run("initdb", "-A", "trust", "-U", "bs_exp")
    run(
        "pg_ctl", "start", "-w", "-l", str(folder / "log"), "-o", f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    )
    try:
        yield f"postgresql://bs_exp@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "stop", "-m", "immediate")
        shutil.rmtree(folder)


@pytest.mark.slow
def test_two_commands_share_a_study_in_postgresql_and_one_is_killed(
    searching: Tiny, postgresql: str, tmp_path: Path
) -> None:
    settings = (*searching, f"hydra.sweeper.storage={postgresql}", "hydra.sweeper.n_trials=8")
    killed, other = (start(*settings, folder=tmp_path) for _ in range(2))
    end = time.monotonic() + 100
    while not any(f'"process": {killed.pid}' in text for text in _running(tmp_path / FOLDER)):
        assert time.monotonic() < end and killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    _, err = other.communicate(timeout=200)
    assert other.returncode == 0, err
    # It takes over what was in flight, if it is not through before that.
    again = start(*settings, folder=tmp_path)
    _, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    trials = rows(tmp_path / FOLDER)
    assert [row["state"] for row in trials] == ["completed"] * 8
    assert len([row for row in trials if row["repeats"]]) == 1


def _running(folder: Path) -> Iterator[str]:
    """The records of points that are under way."""
    for path in folder.glob("*/record.json"):
        with suppress(OSError):  # written anew
            if '"status": "running"' in (text := path.read_text()):
                yield text


@pytest.mark.slow
def test_a_killed_search_goes_on(searching: Tiny, tmp_path: Path) -> None:
    search = start(*searching, "hydra.sweeper.n_trials=6", folder=tmp_path)
    end = time.monotonic() + 100
    while len(list((tmp_path / FOLDER).glob("*/record.json"))) < 3:
        assert time.monotonic() < end and search.poll() is None
        time.sleep(0.01)
    search.kill()
    search.communicate()
    records = [read_record(path) for path in (tmp_path / FOLDER).glob("*/record.json")]
    before = {record.run_id for record in records if record.status is Status.COMPLETED}
    again = start(*searching, "hydra.sweeper.n_trials=6", folder=tmp_path)
    _, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    trials = rows(tmp_path / FOLDER)
    assert [row["state"] for row in trials] == ["completed"] * 6
    finished = [read_record(tmp_path / FOLDER / row["folder"]) for row in trials]
    assert before <= {record.run_id for record in finished if record.process == search.pid}


@pytest.mark.slow
def test_trials_side_by_side_by_joblib(searching: Tiny, tmp_path: Path) -> None:
    command = start(
        *searching, "hydra/launcher=joblib", "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=4", folder=tmp_path
    )
    out, err = command.communicate(timeout=200)
    assert command.returncode == 0, err
    trials = rows(tmp_path / FOLDER)
    assert [row["state"] for row in trials] == ["completed"] * 4
    processes = {read_record(tmp_path / FOLDER / row["folder"]).process for row in trials}
    assert len(processes) == 2 and command.pid not in processes
    assert "ppl/text" in out
