"""A sweep that stops goes on where it stopped, and no point is ever run twice."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import read_write

from bs_exp.cli.conf_root import root_folder
from bs_exp.cli.points import sweep_name
from bs_exp.records.record import RecordError, RunRecord, Status, read_record

Cli = Callable[..., Any]
Tiny = tuple[str, ...]
ROOT = Path(__file__).parents[2]
RATIOS = "retain_ratio=0.9,0.8,0.7,0.6"


def _records(sweep: Path) -> dict[float, RunRecord]:
    """The sweep's records that can be read, by ratio."""
    found = {}
    for path in sweep.glob("*/record.json"):
        try:
            record = read_record(path)
        except RecordError:
            continue
        found[record.config["retain_ratio"]] = record
    return found


def _start(tiny: Tiny, folder: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bs_exp", *tiny, RATIOS, "-m", *more],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _sweep_folder(folder: Path) -> Path:
    (sweep,) = (folder / "outputs" / "sweeps").iterdir()
    return sweep


def test_the_same_command_goes_on_and_leaves_alone_what_is_finished(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    # Two presets: all points lie in one folder, whatever name their preset has.
    command = [*tiny, "experiment=svd,svd_llm,asvd", "-m"]
    first = cli(*command)
    assert first.status == 0, first.err
    sweep = _sweep_folder(tmp_path)
    assert "[1/3] completed experiment=svd  ppl/text " in first.err
    assert "about" in first.err.split("[1/3]")[1].splitlines()[0]
    assert "points   3: 3 completed" in first.out
    folders = {read_record(path).name: path.parent for path in sweep.glob("*/record.json")}
    assert {name: folder.name for name, folder in folders.items()} == {
        name: f"{name}@0.8-{read_record(folder).config_hash[:12]}" for name, folder in folders.items()
    }
    # As an earlier version called it: a folder is found by its hash.
    folders["svd"] = folders["svd"].rename(sweep / folders["svd"].name.removeprefix("svd@0.8-"))

    # One is finished, one was killed, and one left half a record.
    finished = read_record(folders["svd"])
    killed, half = (folders[name] / "record.json" for name in ("svd_llm", "asvd"))
    killed.write_text(killed.read_text().replace('"status": "completed"', '"status": "running"'))
    half.write_text(half.read_text()[:100])
    again = cli(*command)
    assert again.status == 0, again.err
    assert "1 of them finished before" in again.err
    assert "[1/3] kept experiment=svd " in again.err
    assert f"{half.name} is not JSON" in again.err
    assert "points   3: 2 completed, 1 kept" in again.out
    assert read_record(folders["svd"]) == finished
    assert read_record(half).status is read_record(killed).status is Status.COMPLETED


@pytest.mark.slow
def test_finished_points_run_again_where_that_is_asked_for(cli: Cli, tiny: Tiny) -> None:
    command = ["-m", *tiny, "retain_ratio=0.8", "hydra.sweep.dir=sweep"]
    assert "1 completed" in cli(*command).out
    assert "1 kept" in cli(*command).out
    assert "1 completed" in cli(*command, "force=true").out
    # A model that was not saved has to be made.
    assert "1 completed" in cli(*command, "save_model=true").out
    assert "1 kept" in cli(*command, "save_model=true").out


def test_a_point_whose_model_was_cut_is_run_again(cli: Cli, tiny: Tiny) -> None:
    command = [*tiny, "retain_ratio=0.9,0.8", "save_model=true", "-m"]
    assert cli(*command).status == 0
    first = _records(_sweep_folder(Path.cwd()))
    weights = next(_sweep_folder(Path.cwd()).glob("*/model/model.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    again = cli(*command)
    assert "1 of them finished before" in again.err
    assert again.status == 0 and f"{len(whole) - 8:,} bytes, {len(whole)} were saved" in again.err
    assert weights.read_bytes() == whole
    started = [first[ratio].started != record.started for ratio, record in _records(_sweep_folder(Path.cwd())).items()]
    assert sorted(started) == [False, True]


@pytest.mark.parametrize(
    "place", ["point/.hydra", "point/.hydra/config.yaml", "point/__main__.log", "multirun.yaml", "point"]
)
def test_a_received_sweep_with_links_is_refused_before_anything_is_written(
    cli: Cli, tiny: Tiny, tmp_path: Path, place: str
) -> None:
    """What is written by its name would follow them out of the folder."""
    outside, link = tmp_path / "outside", tmp_path / "sweep" / place
    link.parent.mkdir(parents=True)
    outside.mkdir()
    (outside / "config.yaml").write_text("mine")
    link.symlink_to(outside / "config.yaml" if "." in link.name[1:] else outside)
    before = sorted(path for path in tmp_path.rglob("*"))
    done = cli(*tiny, "retain_ratio=0.8,0.6", "-m", f"hydra.sweep.dir={tmp_path}/sweep")
    assert done.status == 1 and f"{link} is a link" in done.err and "hydra.sweep.dir=DIR" in done.err
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert (outside / "config.yaml").read_text() == "mine"


def test_a_run_in_a_folder_with_links_is_refused(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".hydra").symlink_to(tmp_path)
    done = cli(*tiny, f"hydra.run.dir={tmp_path}/run")
    assert done.status == 1 and "run/.hydra is a link" in done.err and "hydra.run.dir=DIR" in done.err


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ((), "table_scales"),
        (("model=demo", "debug=true", "tracking=none"), "table_scales,model=demo"),
        (("model=demo", "seed=1,2"), "table_scales,model=demo,seed=1,2"),
        (("calibration.files=[a/b.txt]",), "table_scales,files=a-b.txt-"),
        (("model=demo", "name=mine"), "mine"),
        (("name=mine,yours",), "table_scales"),
    ],
)
def test_a_sweep_is_named_by_its_file_and_what_was_set(more: tuple[str, ...], name: str) -> None:
    with initialize_config_dir(str(root_folder() / "conf"), version_base="1.3"):
        cfg = compose("config", ["sweeps=table_scales"], return_hydra_config=True)
    with read_write(cfg):
        cfg.hydra.overrides.task = ["sweeps=table_scales", *more]
    found = sweep_name(cfg)
    assert found == name or (name.endswith("-") and re.fullmatch(f"{name}[0-9a-f]{{8}}", found))


@pytest.mark.slow
def test_kill_9_loses_what_was_in_flight_and_nothing_else(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    with _start(tiny, tmp_path) as sweep:
        deadline = time.monotonic() + 100
        while not (tmp_path / "outputs" / "sweeps").exists() or not any(
            record.status is Status.COMPLETED for record in _records(_sweep_folder(tmp_path)).values()
        ):
            assert time.monotonic() < deadline and sweep.poll() is None, "the sweep never finished a point"
            time.sleep(0.01)
        sweep.send_signal(signal.SIGKILL)
    folder = _sweep_folder(tmp_path)
    killed = _records(folder)
    finished = {ratio: record for ratio, record in killed.items() if record.status is Status.COMPLETED}
    in_flight = {ratio for ratio, record in killed.items() if record.status is Status.RUNNING}
    assert 1 <= len(finished) < 4
    assert len(in_flight) <= 1

    done = cli(*tiny, RATIOS, "-m")
    assert done.status == 0, done.err
    after = _records(folder)
    assert len(after) == 4
    assert {record.status for record in after.values()} == {Status.COMPLETED}
    assert {ratio: after[ratio] for ratio in finished} == finished
    assert {after[ratio].process for ratio in after.keys() - finished.keys()} == {os.getpid()}
    # What was cached before is not made again, the point in flight included.
    assert all(not record.cache["misses"].get("gram") for r, record in after.items() if r not in finished)
    assert f"{len(finished)} kept" in done.out


@pytest.mark.slow
def test_two_at_once_run_every_point_once(tiny: Tiny, tmp_path: Path) -> None:
    both = [_start(tiny, tmp_path) for _ in range(2)]
    runs, deadline = set(), time.monotonic() + 200
    while any(process.poll() is None for process in both):
        assert time.monotonic() < deadline
        if (tmp_path / "outputs" / "sweeps").exists():
            # A record says from its first second on who runs the point, so another run of it would be seen.
            runs |= {(ratio, r.process, r.started) for ratio, r in _records(_sweep_folder(tmp_path)).items()}
        time.sleep(0.02)
    ends = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    records = _records(_sweep_folder(tmp_path))
    assert {record.status for record in records.values()} == {Status.COMPLETED}
    runs |= {(ratio, r.process, r.started) for ratio, r in records.items()}
    by_process = Counter(process for _, process, _ in runs)
    assert by_process.keys() <= {process.pid for process in both} and by_process.total() == len(records) == 4
    for out, _ in ends:  # what the other one ran while this one waited is completed, what it ran before is kept
        (counts,) = re.findall(r"^points   4: (.*)$", out, re.MULTILINE)
        outcomes = {outcome: int(count) for count, outcome in re.findall(r"(\d+) ([a-z ]+)", counts)}
        assert outcomes.keys() <= {"completed", "kept"} and sum(outcomes.values()) == 4, out


@pytest.mark.slow
def test_interrupt_ends_the_sweep_and_says_how_far_it_came(tiny: Tiny, tmp_path: Path) -> None:
    with _start(tiny, tmp_path) as sweep:
        deadline = time.monotonic() + 100
        while not (tmp_path / "outputs" / "sweeps").exists() or not _records(_sweep_folder(tmp_path)):
            assert time.monotonic() < deadline and sweep.poll() is None
            time.sleep(0.01)
        sweep.send_signal(signal.SIGINT)
        out, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    assert "Traceback" not in err
    assert re.search(r"points   4: .*\d not run", out), out
    assert "the same command again" in out
