"""A second ratio in a process of its own costs its own evaluation only, and never takes what is stale."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bs_exp.corpora import evaluated, windows
from bs_exp.corpora.text_files import TextFiles
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
    run: Callable[..., RunRecord], tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a text was read or tokenised")

    first = run("first", "retain_ratio=0.8")
    with monkeypatch.context() as patched:
        patched.setattr(TextFiles, "documents", refuse)
        patched.setattr(windows, "tokenize", refuse)
        second = run("second", "retain_ratio=0.6")
    assert (first.cache["misses"]["evaluated_windows"], second.cache["hits"]["evaluated_windows"]) == (1, 1)
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


def test_text_that_changes_while_it_is_evaluated_is_kept_for_nobody(
    run: Callable[..., RunRecord], tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = evaluated.cut_windows

    def cut_and_change(*arguments: Any, **settings: Any) -> Any:
        (tmp_path / "B.txt").write_text((texts / "A.txt").read_text())
        return cut(*arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(evaluated, "cut_windows", cut_and_change)
        changed = run("changed")
    assert changed.metrics["dense"]["ppl_text_sha256/text"] != changed.metrics["compressed"]["ppl_text_sha256/text"]
    # Those of the second text, which were cut for the compressed model.
    assert len(list((tmp_path / "cache" / "evaluated_windows").iterdir())) == 1
    (tmp_path / "B.txt").write_text((texts / "B.txt").read_text())
    again = run("again")
    digest = "ppl_text_sha256/text"
    assert again.metrics["dense"][digest] == again.metrics["compressed"][digest] == changed.metrics["dense"][digest]


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
