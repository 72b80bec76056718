"""A second ratio in a process of its own costs its own evaluation only, and never takes what is stale."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bs_exp.records.record import RunRecord, read_record
from bs_exp.runs import content_keys

Cli = Callable[..., Any]


@pytest.fixture
def run(cli: Cli, tiny: tuple[str, ...], texts: Path, tmp_path: Path) -> Callable[..., RunRecord]:
    """Runs a point on files that a test may change; every call has a store of its own, as a process has."""
    for name in ("A.txt", "B.txt"):
        (tmp_path / name).write_text((texts / name).read_text())
    ours = ("calibration.files", "evaluation.files")
    settings = [s for s in tiny if not s.startswith(ours)]
    settings += [f"calibration.files=[{tmp_path}/A.txt]", f"evaluation.files=[{tmp_path}/B.txt]"]

    def call(name: str, *more: str) -> RunRecord:
        done = cli(*settings, "cache.dir=cache", f"hydra.run.dir={name}", *more)
        assert done.status == 0, done.err
        return read_record(tmp_path / name)

    return call


def _measured(record: RunRecord) -> tuple[bool, bool]:
    """Whether the dense model was evaluated, and the windows of calibration were cut."""
    return "perplexity (dense)" in record.timings, record.cache["misses"].get("tokenisation", 0) > 0


def test_a_second_ratio_takes_dense_metrics_and_windows_of_the_first(
    run: Callable[..., RunRecord], tmp_path: Path, texts: Path
) -> None:
    first, second = run("first", "retain_ratio=0.8"), run("second", "retain_ratio=0.6")
    assert (_measured(first), _measured(second)) == ((True, True), (False, False))
    assert second.provenance["dense_metrics"] == {"perplexity": first.run_id}
    assert second.metrics["dense"] == first.metrics["dense"]
    assert second.provenance["calibration"] == first.provenance["calibration"]

    alone = run("alone", "retain_ratio=0.6", "cache.dir=null")
    assert _measured(alone)[0] and "dense_metrics" not in alone.provenance
    assert alone.plan == second.plan and alone.metrics == second.metrics

    (tmp_path / "B.txt").write_text((texts / "A.txt").read_text())
    other_text = run("text")
    assert _measured(other_text) == (True, False)
    assert other_text.metrics["dense"] != first.metrics["dense"]


@pytest.mark.slow
def test_other_models_machines_and_texts_are_measured_again(
    run: Callable[..., RunRecord], tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("first")
    assert _measured(run("model", "model.seed=1")) == (True, False)
    assert _measured(run("length", "evaluation.sequence_length=32")) == (True, False)
    (tmp_path / "A.txt").write_text((texts / "B.txt").read_text())
    assert _measured(run("calibration")) == (False, True)
    with monkeypatch.context() as patched:
        patched.setattr(content_keys, "machine", lambda device: {"device": "another"})
        assert _measured(run("machine")) == (True, False)


def test_a_damaged_entry_is_measured_again(run: Callable[..., RunRecord], tmp_path: Path) -> None:
    first = run("first")
    (entry,) = (tmp_path / "cache" / "dense_evaluation").glob("*.safetensors")
    content = entry.read_bytes()
    place = content.index(json.dumps(first.run_id).encode())
    entry.write_bytes(content[: place + 1] + b"X" + content[place + 2 :])
    again = run("again")
    assert _measured(again)[0]
    assert again.cache["damaged"] == {"dense_evaluation": 1}
    assert again.metrics["dense"] == first.metrics["dense"]
