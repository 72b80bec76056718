"""Whole runs of the command line on tiny models: the contract that others script against, presets, sweeps, tracking."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import bs_exp  # noqa: F401  registers the plug-in with which compressed models load
from bs_exp.models.tiny import tiny_random
from bs_exp.records.record import Status, read_record

Cli = Callable[..., Any]
Tiny = tuple[str, ...]
ROOT = Path(__file__).parent.parent


def test_contract_as_others_script_it(tmp_path: Path, texts: Path) -> None:
    model = tiny_random("llama", layers=3)
    model.module.save_pretrained(tmp_path / "dense")
    model.tokenizer.save_pretrained(tmp_path / "dense")
    out = tmp_path / "out"
    subprocess.run(
        [
            *(sys.executable, "-m", "bs_exp", "model=local", f"model.path={tmp_path}/dense"),
            *("calibration=text", f"calibration.files=[{texts}/A.txt]", "calibration.num_sequences=all"),
            *("calibration.sequence_length=128", "calibration.order=sequential"),
            *("evaluation=text", f"evaluation.files=[{texts}/B.txt]", "evaluation.sequence_length=128"),
            *("experiment=basis_sharing", "retain_ratio=0.8", "sharing.group_size=2"),
            *("save_model=true", "tracking=none", f"hydra.run.dir={out}"),
        ],
        cwd=tmp_path,
        env=_with_path(),
        check=True,
    )
    record = json.loads((out / "record.json").read_text())
    assert record["status"] == "completed"
    assert record["config"]["retain_ratio"] == 0.8
    assert record["metrics"]["dense"]["ppl/text"] > 1
    assert record["metrics"]["compressed"]["ppl/text"] > 1
    assert {"load", "calibrate", "decompose", "save"} <= record["timings"].keys()
    assert 0.7 < record["size"]["retain_ratio"] <= 0.8
    assert 0 < record["size"]["bytes"] < record["size"]["dense_bytes"]
    groups = record["plan"]["groups"]
    assert {(g["matrix"], tuple(g["layers"])) for g in groups if g["matrix"] in ("q", "o")} == {
        *(("q", (0, 1)), ("q", (2,))),
        *(("o", (0,)), ("o", (1,)), ("o", (2,))),
    }
    assert all(g["rank"] is None or g["rank"] >= 1 for g in groups)
    loaded = AutoModelForCausalLM.from_pretrained(out / "model")
    assert loaded(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("preset", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")))
def test_preset_runs(cli: Cli, tiny: Tiny, tmp_path: Path, preset: str) -> None:
    few_steps = {
        "best_recovered": ["update.updates.recover.steps=4", "update.updates.recover.evaluate_every=2"],
        "dipsvd_bayesopt": ["allocation.trials=3", "allocation.num_windows=2"],
    }.get(preset, [])
    done = cli(*tiny, f"experiment={preset}", "hydra.run.dir=out", *few_steps)
    assert done.status == 0, done.err
    assert f"{preset}: completed" in done.out
    record = read_record(tmp_path / "out")
    assert record.name == preset
    assert record.objective == record.metrics["compressed"]["ppl/text"]
    shared = [g for g in record.plan["groups"] if len(g["layers"]) > 1]  # type: ignore[index]
    assert bool(shared) == (preset == "drank" or preset.startswith("basis_sharing"))


def test_record_tells_where_its_numbers_come_from(cli: Cli, tiny: Tiny, texts: Path, tmp_path: Path) -> None:
    assert cli(*tiny, "hydra.run.dir=out", "save_model=true").status == 0
    record = read_record(tmp_path / "out")
    assert record.config["calibration"]["files"] == [f"{texts}/A.txt"]
    assert record.provenance["model"]["fingerprint"]
    assert record.provenance["calibration"]["corpus"]
    assert record.memory["process_bytes"] > 2**20
    assert record.cache["misses"]["decomposition"] == len(record.plan["groups"])  # type: ignore[index]
    assert record.size["saved_bytes"] >= record.size["bytes"]
    assert record.model_folder == "model"


def test_sweep_goes_on_past_a_failure_and_reuses_its_work(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    done = cli(*tiny, "retain_ratio=0.8,0.00001,0.6", "hydra.sweep.dir=sweep", "--multirun")
    assert done.status == 1
    records = [read_record(path) for path in (tmp_path / "sweep").glob("*/record.json")]
    first, failed, last = sorted(records, key=lambda record: record.sweep["job"])  # type: ignore[index]
    assert (first.status, failed.status, last.status) == (Status.COMPLETED, Status.FAILED, Status.COMPLETED)
    assert done.err.index("error: retain_ratio 1e-05") < done.err.index("Error executing job")
    assert done.err.count("error: retain_ratio 1e-05") == 1
    assert "Traceback" not in done.err
    assert failed.error is not None and failed.error["stage"] == "group"
    assert last.cache["hits"]["decomposition"] == len(last.plan["groups"])  # type: ignore[index]
    assert last.cache["misses"] == {}
    # No state is carried from one run to the next.
    assert first.metrics["dense"] == last.metrics["dense"]
    assert first.sweep is not None
    assert (first.sweep["id"], first.sweep["job"]) == ("sweep", 0)
    assert first.sweep["settings"] == [*tiny, "retain_ratio=0.8"]
    alone = cli(*tiny, "retain_ratio=0.6", "hydra.run.dir=alone", "cache.dir=null")
    assert alone.status == 0, alone.err
    assert read_record(tmp_path / "alone").metrics == last.metrics


@pytest.mark.slow
def test_two_runs_at_once_do_not_collide(tiny: Tiny, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bs_exp", *tiny]
    runs = [subprocess.Popen(command, cwd=tmp_path, env=_with_path(), stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    records = [read_record(path) for path in (tmp_path / "outputs" / "runs").glob("*/*/record.json")]
    assert [record.status for record in records] == [Status.COMPLETED] * 2
    assert records[0].metrics == records[1].metrics
    assert records[0].run_id != records[1].run_id
    assert not list((tmp_path / "outputs" / "cache").rglob("*.tmp"))


def test_wandb_stays_offline_in_the_run_folder(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    done = cli(*tiny, "tracking=wandb", "hydra.run.dir=out")
    assert done.status == 0, done.err
    record = read_record(tmp_path / "out")
    assert record.notes == ()
    assert len(list((tmp_path / "out" / "wandb").glob(f"offline-run-*-{record.run_id}/*.wandb"))) == 1
    assert "wandb" not in done.err


def test_run_goes_on_if_wandb_cannot_start(
    cli: Cli, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "no-key")
    done = cli(*tiny, "tracking=wandb", "tracking.timeout=5", "hydra.run.dir=out")
    assert done.status == 0, done.err
    assert "goes on without tracking" in done.err
    assert [note for note in read_record(tmp_path / "out").notes if "W&B could not start" in note]


def _with_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}
