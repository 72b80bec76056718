"""Points beside each other: in processes of this machine, and as jobs of a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf
from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf

from bs_exp.config import root_folder
from bs_exp.records import Status, read_record

Tiny = tuple[str, ...]
CONF = root_folder() / "conf"
ROOT = Path(__file__).parents[2]
OPTIONS = {"joblib": JobLibLauncherConf, "submitit_slurm": SlurmQueueConf, "submitit_local": LocalQueueConf}


@pytest.mark.filterwarnings("ignore:\\s*'hydra/launcher/:UserWarning")
@pytest.mark.parametrize("option", OPTIONS)
def test_option_is_one_of_the_launchers(option: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        launcher = compose("config", [f"hydra/launcher={option}"], return_hydra_config=True).hydra.launcher
    assert launcher._target_ == OPTIONS[option]._target_
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
    command = [sys.executable, "-m", "bs_exp", *tiny, "retain_ratio=0.8,2,0.6", f"hydra/launcher={launcher}", "-m"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == 1, first.stderr
    assert "points   3: 2 completed, 1 failed" in first.stdout, first.stderr
    assert "retain_ratio must be above 0" in first.stdout
    assert "Warning" not in first.stderr
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    records = [read_record(path) for path in sweep.glob("*/record.json")]
    assert sorted(record.status for record in records) == [Status.COMPLETED, Status.COMPLETED, Status.FAILED]
    assert len({record.process for record in records}) >= 2
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "points   3: 2 kept, 1 failed" in again.stdout, again.stderr
