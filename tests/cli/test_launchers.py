"""Points beside each other: in processes of this machine, and as jobs of a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf
from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf

from bs_exp.cli.conf_root import root_folder
from bs_exp.records.record import Status, read_record

Tiny = tuple[str, ...]
CONF = root_folder() / "conf"
ROOT = Path(__file__).parents[2]
OPTIONS = {"joblib": JobLibLauncherConf, "submitit_slurm": SlurmQueueConf, "submitit_local": LocalQueueConf}


@pytest.mark.filterwarnings("ignore:\\s*'hydra/launcher/:UserWarning")
@pytest.mark.parametrize("option", OPTIONS)
def test_option_is_one_of_the_launchers(option: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        launcher = compose("config", [f"hydra/launcher={option}"], return_hydra_config=True).hydra.launcher
    # By the name of its class: those for submitit are ours, with the same settings.
    assert launcher._target_.rpartition(".")[2] == OPTIONS[option]._target_.rpartition(".")[2]
    assert Plugins.instance().is_in_toplevel_plugins_module(launcher._target_)
    assert set(launcher) <= set(OPTIONS[option].__dataclass_fields__)


def test_a_launcher_that_is_not_installed_says_what_to_install(cli: Callable[..., Any], tiny: Tiny) -> None:
    done = cli("-m", *tiny, "hydra/launcher=basic", "hydra.launcher._target_=hydra_plugins.absent.Launcher")
    assert done.status == 1
    assert "error: hydra_plugins.absent.Launcher is not installed" in done.err
    assert "pip install '.[cluster]'" in done.err


def test_every_option_is_tested() -> None:
    assert {path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml")} == set(OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_points_run_beside_each_other_and_are_found_again(tiny: Tiny, tmp_path: Path, launcher: str) -> None:
    command = [
        sys.executable,
        "-m",
        "bs_exp",
        *tiny,
        "retain_ratio=0.8,0.00001,0.6",
        f"hydra/launcher={launcher}",
        "-m",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == 1, first.stderr
    assert "points   3: 2 completed, 1 failed" in first.stdout, first.stderr
    assert "retain_ratio 1e-05" in first.stdout
    assert "Warning" not in first.stderr
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    records = [read_record(path) for path in sweep.glob("*/record.json")]
    assert sorted(record.status for record in records) == [Status.COMPLETED, Status.COMPLETED, Status.FAILED]
    assert len({record.process for record in records}) >= 2
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "points   3: 2 kept, 1 failed" in again.stdout, again.stderr


@pytest.mark.slow
def test_a_job_without_a_result_is_a_failed_point_and_the_others_are_waited_for(tiny: Tiny, tmp_path: Path) -> None:
    settings = [*tiny, "retain_ratio=0.8,0.6", "hydra/launcher=submitit_local", "hydra.sweep.dir=sweep"]
    command = [sys.executable, "-m", "bs_exp", "-m", *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as sweep:
        end = time.monotonic() + 100
        while not (jobs := _jobs(sweep.pid)):
            assert time.monotonic() < end and sweep.poll() is None
            time.sleep(0.02)
        job = jobs[0].ppid()
        jobs[0].kill()
        out, err = sweep.communicate(timeout=200)
    assert sweep.returncode == 1
    assert f"error: Job {job} left no result" in err, err
    assert "_log.err. Where memory or time was too short" in err and "Traceback" not in err
    assert "1 completed, 1 " in out, out
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "points   2: 1 completed, 1 kept" in again.stdout, again.stderr


@pytest.mark.slow
def test_the_tasks_of_a_job_share_its_point(tiny: Tiny, tmp_path: Path) -> None:
    """Same ranks and metrics as in one process; a point that fails in both fails once, and what is done is kept."""
    settings = [*tiny, "retain_ratio=0.8,0.00001", "calibration.batch_size=2", "evaluation.batch_size=2"]
    tasks = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*more: str) -> str:
        command = [sys.executable, "-m", "bs_exp", "-m", *settings, *more]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 1, ended.stderr
        return ended.stdout + ended.stderr

    told = run("hydra.sweep.dir=together", *tasks)
    assert "points   2: 1 completed, 1 failed" in told, told
    run("hydra.sweep.dir=alone")
    (together,), (alone,) = (
        [found for path in (tmp_path / name).glob("*/record.json") if (found := read_record(path)).plan is not None]
        for name in ("together", "alone")
    )
    assert together.provenance["processes"] == 2 and "processes" not in alone.provenance
    assert together.plan is not None and alone.plan is not None
    assert [g["rank"] for g in together.plan["groups"]] == [g["rank"] for g in alone.plan["groups"]]
    one, other = (found.metrics["compressed"]["ppl/text"] for found in (together, alone))
    assert one == pytest.approx(other, rel=1e-5)
    assert "points   2: 1 kept, 1 failed" in run("hydra.sweep.dir=together", *tasks)


def _jobs(sweep: int) -> list[psutil.Process]:
    """The processes that a sweep's points run in: each is the child of a controller, by which submitit names it."""
    children = psutil.Process(sweep).children(recursive=True)
    return [child for child in children if "submitit.core._submit" in child.cmdline()]
