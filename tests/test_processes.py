"""Several processes that `torchrun` starts for one run share the work and give the result of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from bs_exp import processes
from bs_exp.cli.process_folder import process_folder
from bs_exp.errors import ConfigError
from bs_exp.linalg.packing import unpack_symmetric

# Batches of two windows, the last one smaller.
SETTINGS = [
    "experiment=best",
    "schedule=single",
    "retain_ratio=0.6",
    "evaluation.batch_size=2",
    "calibration.batch_size=2",
    "save_model=true",
]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _command(launcher: tuple[str, ...], folder: Path, tiny: tuple[str, ...]) -> list[str]:
    places = [f"cache.dir={folder / 'cache'}", f"hydra.run.dir={folder / 'run'}"]
    return [*launcher, "-m", "bs_exp", *tiny, *SETTINGS, *places]


def _run(launcher: tuple[str, ...], folder: Path, tiny: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    command = _command(launcher, folder, tiny)
    return subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=250)


def _record(folder: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((folder / "run" / "record.json").read_text(encoding="utf-8"))
    return found


def _grams(folder: Path) -> torch.Tensor:
    """The traces of all Grams of a cache folder, and of their squares, sorted: what no order of files changes."""
    found = []
    for path in sorted((folder / "cache" / "gram").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            gram = unpack_symmetric(file.get_tensor("gram"))
        found += [gram.trace(), (gram @ gram).trace().sqrt()]
    return torch.stack(found).sort().values


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    """Same ranks, Grams to 1e-12, same perplexity."""
    one, two = tmp_path / "one", tmp_path / "two"
    alone = _run((sys.executable,), one, tiny)
    together = _run(TORCHRUN, two, tiny)
    assert alone.returncode == 0, alone.stderr
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("record ") == 1  # one table, of the first process
    before, after = _record(one), _record(two)
    ranks = [[(g["matrix"], g["layers"], g["rank"]) for g in r["plan"]["groups"]] for r in (before, after)]
    assert ranks[0] == ranks[1]
    torch.testing.assert_close(_grams(two), _grams(one), rtol=1e-12, atol=0.0)
    for label, within in (("dense", 1e-12), ("compressed", 1e-5)):
        values = [r["metrics"][label]["ppl/text"] for r in (before, after)]
        assert values[1] == pytest.approx(values[0], rel=within)
    assert after["metrics"]["compressed"].keys() == before["metrics"]["compressed"].keys()
    assert after["provenance"]["processes"] == 2
    assert (two / "run" / "model" / "model.safetensors").is_file()
    # The same again finds all statistics and factors.
    again = _run(TORCHRUN, two, tiny)
    assert again.returncode == 0, again.stderr
    assert _record(two)["cache"]["misses"].keys().isdisjoint({"gram", "output_gram", "decomposition"})
    assert _record(two)["metrics"] == after["metrics"]


@pytest.mark.slow
def test_the_death_of_a_process_ends_the_run_and_its_record_says_so(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    command = [*_command(TORCHRUN, tmp_path, tiny), "schedule=steps", "schedule.size=0.002"]
    with subprocess.Popen(command, env=_environment(), stderr=subprocess.PIPE) as launcher:
        deadline = time.monotonic() + 200
        while not list((tmp_path / "cache").glob("gram/*.safetensors")):
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.2)
        os.kill(_second_process(launcher.pid), signal.SIGKILL)
        launcher.communicate(timeout=100)
    assert launcher.returncode != 0
    record = _record(tmp_path)
    assert record["status"] in ("failed", "interrupted")


def _second_process(launcher: int) -> int:
    for entry in Path("/proc").iterdir():
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            environment = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if parent == str(launcher) and b"RANK=1" in environment:
            return int(entry.name)
    raise AssertionError("no second process")


def test_a_single_process_finds_everything_without_effect() -> None:
    tensor = torch.arange(3.0)
    with processes.joined():
        assert processes.count() == processes.launched() == 1
        assert processes.is_first()
        assert processes.mine("abc") == ["a", "b", "c"]
        assert processes.put_together([1, 2], 2) == [1, 2]
        assert processes.add_up(tensor) is tensor
        assert processes.total_of(3) == 3
        assert processes.from_first(lambda: 5) == 5
    with pytest.raises(ValueError, match="this one"):
        processes.raise_together(ValueError("this one"))


def test_a_sweep_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="leave out -m"), process_folder(["bs-exp", "-m", "retain_ratio=0.8,0.6"]):
        pass


def test_other_processes_write_into_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    arguments = ["bs-exp", "hydra.run.dir=OUT"]
    with process_folder(arguments):
        folder = Path(arguments[2].removeprefix("hydra.run.dir="))
        assert folder.is_dir()
    assert not folder.exists()


def test_what_any_process_lacks_is_missing_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.anywhere([True, False]) == [True, False]  # alone
    monkeypatch.setattr(processes, "_joined", True)
    monkeypatch.setattr(processes, "_gathered", lambda own: [own, [False, False, True]])
    assert processes.anywhere([True, False, False]) == [True, False, True]
