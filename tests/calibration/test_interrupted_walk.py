"""A walk that was interrupted goes on: finished blocks' statistics come from the cache, and it begins at its block."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bs_exp.cache import Cache
from bs_exp.calibration.group_statistics import CalibrationStats, calibrate, statistics_key
from bs_exp.calibration.walk import check_room
from bs_exp.errors import CacheError
from bs_exp.models.kept_states import KeptStates
from bs_exp.models.loading import LocalModel
from bs_exp.models.tiny import tiny_random
from bs_exp.progress import Progress
from bs_exp.types import Activations, CalibrationData, LoadedModel, Statistic, TokenWindows
from bs_exp.workspace import Workspace

WINDOWS = TokenWindows(
    ids=torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(0)), provenance={"sha256": "x"}
)
QUIET = Progress(quiet=True)
LAYERS = 4
# Killed while it gathers statistics of block 2, in the middle of its batches.
KILLED = """
import os, signal, sys
from pathlib import Path
from bs_exp.models.loading import LocalModel
from tests.calibration.test_interrupted_walk import calibrated
model = LocalModel(path=sys.argv[1], device="cpu", offload="disk").load()
calls = 0
def kill(module, arguments, output):
    global calls
    calls += len(list(Path(sys.argv[2]).glob("gram/*"))) == 8
    if calls == 2:
        os.kill(os.getpid(), signal.SIGKILL)
model.module.get_submodule(model.architecture.blocks[2]).register_forward_hook(kill)
calibrated(model, Path(sys.argv[2]), sys.argv[3])
"""


def calibrated(model: LoadedModel, folder: Path, activations: Activations) -> CalibrationStats:
    data = CalibrationData(WINDOWS, 2, activations)
    return calibrate(model, data, needs={Statistic.GRAM}, workspace=Workspace(Cache(folder), QUIET))


def grams(stats: CalibrationStats) -> dict[str, Tensor]:
    return {name: entry.tensor("gram") for name, entry in stats.entries[Statistic.GRAM].items()}


def saved(folder: Path) -> Path:
    model = tiny_random(layers=LAYERS)
    model.module.save_pretrained(folder, max_shard_size="20KB")
    model.tokenizer.save_pretrained(folder)
    return folder


def killed(model: Path, cache: Path, activations: Activations) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(model), str(cache), activations],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -9, done.stderr


def runs_of(model: LoadedModel) -> list[int]:
    """Layers in the order in which they run on batches of two windows, filled in as they do."""
    order: list[int] = []
    for layer, path in enumerate(model.architecture.blocks):

        def note(module: object, arguments: tuple[Tensor, ...], output: Tensor, layer: int = layer) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if len(states) == 2:
                order.append(layer)

        model.module.get_submodule(path).register_forward_hook(note)
    return order


@pytest.mark.parametrize(("activations", "first"), [("disk", 2), pytest.param("memory", 0, marks=pytest.mark.slow)])
def test_after_kill_9(activations: Activations, first: int, tmp_path: Path) -> None:
    folder, cache = saved(tmp_path / "model"), tmp_path / "cache"
    killed(folder, cache, activations)
    finished = {path.name: path.stat().st_ino for path in (cache / "gram").iterdir()}
    assert len(finished) == 2 * 4  # sites of two blocks
    model = LocalModel(path=str(folder), device="cpu", offload="disk").load()
    order = runs_of(model)
    found = grams(calibrated(model, cache, activations))
    assert min(order[-2 * (LAYERS - first) :]) == first
    walked = [layer for layer in range(first, LAYERS) for _ in range(2)]
    assert order[-len(walked) :] == walked
    assert {name: (cache / "gram" / name).stat().st_ino for name in finished} == finished
    whole = grams(calibrated(LocalModel(path=str(folder), device="cpu").load(), tmp_path / "other", "auto"))
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    assert not any(path.is_dir() for path in (cache / "hidden_states").glob("*"))


@pytest.mark.slow
def test_damaged_states_are_not_used(tmp_path: Path) -> None:
    folder, cache = saved(tmp_path / "model"), tmp_path / "cache"
    killed(folder, cache, "disk")
    model = LocalModel(path=str(folder), device="cpu", offload="disk").load()
    [kept] = [path for path in (cache / "hidden_states").iterdir() if path.is_dir()]
    assert kept.name == statistics_key(model, CalibrationData(WINDOWS, 2))
    [marked] = [file for file in kept.glob("2-1.states")]
    content = bytearray(marked.read_bytes())
    content[7] ^= 1
    marked.write_bytes(content)
    found = grams(calibrated(model, cache, "disk"))
    whole = grams(calibrated(LocalModel(path=str(folder), device="cpu").load(), tmp_path / "other", "auto"))
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_kept_states_come_back_whole_or_not_at_all(tmp_path: Path) -> None:
    states = [torch.randn(2, 3, 4), torch.randn(1, 3, 4)]
    kept = KeptStates(tmp_path)
    assert kept.found(states) is None
    for layer in (1, 2):
        for batch, each in enumerate(states):
            kept.put(layer, batch, layer * each)
        assert layer == 1 or kept.found(states) is not None
        if layer == 1:
            assert kept.found(states) is None  # not marked yet
        kept.complete(layer, 2)
    layer, found = KeptStates(tmp_path).found(states) or (0, [])
    assert layer == 2 and all(torch.equal(one, 2 * other) for one, other in zip(found, states, strict=True))
    assert sorted(path.name for path in tmp_path.glob("*.states")) == ["2-0.states", "2-1.states"]
    assert KeptStates(tmp_path).found([torch.empty(2, 3, 5), states[1]]) is None
    assert KeptStates(tmp_path).found([*states, states[0]]) is None


def test_too_little_disk_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LocalModel(path=str(saved(tmp_path)), device="cpu", offload="disk").load()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(CacheError, match=r"take 3.07e-05 GB, but .* has 1e-06 GB free.*calibration\.num_sequences"):
        check_room(model, CalibrationData(WINDOWS, 2, "disk"), tmp_path / "cache", backward=False)
    check_room(model, CalibrationData(WINDOWS, 2, "memory"), tmp_path / "cache", backward=False)
    check_room(tiny_random(), CalibrationData(WINDOWS, 2, "disk"), tmp_path / "cache", backward=True)  # not walked
