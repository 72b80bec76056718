"""`bs-exp estimate`, `dry_run=true`, and what a run says of its estimate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from transformers import AutoConfig

from bs_exp.cli.conf_root import root_folder
from bs_exp.models.loading import HubModel, LocalModel
from bs_exp.models.shapes import known_names
from bs_exp.models.tiny import TinyRandom, tiny_random
from bs_exp.records.record import read_record

Cli = Callable[..., Any]
Tiny = tuple[str, ...]


def test_an_estimate_runs_and_writes_nothing(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    done = cli("estimate", *tiny, "experiment=svd_llm", "save_model=true", "cache.dir=null")
    assert done.status == 0, done.err
    assert "svd_llm at 0.8 on llama-3-0" in done.out and "nothing is run" in done.out
    for told in ("memory ", "disk ", "passes   1 forward, 0 backward", "factor ", "time     about", "free "):
        assert f"\n{told}" in done.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_model_of_70_billion_from_its_configuration(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    """A folder with config.json, no weights, no tokenizer, no network; the same as by its name."""
    AutoConfig.for_model(
        "llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=False,
        dtype="float16",
    ).save_pretrained(tmp_path / "large")  # fmt: skip
    named = HubModel(name="meta-llama/Llama-2-70b-hf", device="cpu").shapes()
    assert LocalModel(path="large", device="cpu").shapes().architecture == named.architecture
    settings = ("model=large", *tiny[1:], "experiment=svd_llm", "calibration.num_sequences=4", "cache.dir=null")
    told = cli("estimate", *settings).out
    assert "68,977 M parameters" in told
    assert "400 eigenvectors of 8192 x 8192, 320 cholesky of 8192 x 8192" in " ".join(told.split())
    # And a run of it ends before anything is loaded, with the number and what lowers it.
    refused = cli(*settings, "hydra.run.dir=run")
    assert refused.status == 1 and "This run does not fit: about" in refused.err
    assert "model.offload=disk" in refused.err and "ignore_estimate=true" in refused.err
    record = read_record(tmp_path / "run")
    assert record.error is not None and record.error["type"] == "EstimateError" and "load" not in record.timings


def test_named_models_have_shapes() -> None:
    files = (root_folder() / "conf" / "model").glob("*.yaml")
    named = {yaml.safe_load(file.read_text(encoding="utf-8")).get("name") for file in files} - {None, "???"}
    assert named <= set(known_names())


def test_what_cannot_be_estimated_is_refused(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    swept = cli("-m", "retain_ratio=0.8,0.6", *tiny, "dry_run=true")
    assert swept.status == 1 and "dry_run=true is for one run" in swept.err
    (tmp_path / "empty").mkdir()
    nothing = cli("estimate", "model=empty", *tiny[1:])
    assert nothing.status == 1 and "holds no config.json" in nothing.err
    unknown = cli("estimate", "model=some/thing", *tiny[1:])
    assert unknown.status == 1 and "put the model's config.json into a folder and name it: model=DIR" in unknown.err


def test_the_estimate_stands_beside_what_was_measured(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    settings = (*tiny, "experiment=svd_llm", "save_model=true", "cache.dir=cache")
    cli("estimate", *settings)  # measures the machine
    assert cli(*settings, "hydra.run.dir=run").status == 0
    cost = read_record(tmp_path / "run").cost
    assert json.loads(json.dumps(cost)) == cost
    estimated, measured = cost["estimated"], cost["measured"]
    assert estimated["seconds"]["calibrate"] > 0 and estimated["rounds"] == [0.8]
    for kind in ("gram", "decomposition", "saved model"):
        assert estimated["disk_bytes"][kind] == pytest.approx(measured["disk_bytes"][kind], rel=0.1), kind
    assert measured["host_bytes"] > 0 and estimated["host_bytes"] > 0


def test_scarce_disk_and_cache_are_told_before_the_work(
    cli: Cli, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scarce = cli(*tiny, "experiment=svd_llm", "cache.dir=cache", "cache.max_gb=0.00001", "hydra.run.dir=run")
    assert scarce.status == 0 and "above cache.max_gb=1e-05" in scarce.err
    free = psutil.virtual_memory()._replace(available=0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    near = cli(*tiny, "experiment=svd_llm", "cache.dir=null", "hydra.run.dir=near")
    assert "GB of host memory are needed" in near.err
    assert any("host memory" in note for note in read_record(tmp_path / "near").notes)


def test_sources_give_the_shapes_of_what_they_load() -> None:
    loaded = tiny_random("qwen3")
    shapes = TinyRandom(family="qwen3").shapes()
    assert shapes.architecture == loaded.architecture and shapes.module.dtype == loaded.module.dtype
    assert {n: p.shape for n, p in shapes.module.named_parameters()} == {
        n: p.shape for n, p in loaded.module.named_parameters()
    }


def test_a_run_that_cannot_be_estimated_goes_on(cli: Cli, tiny: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    """A schedule of somebody else, which no run has ever asked without losses."""
    (tmp_path / "my_schedule.py").write_text(
        "from dataclasses import dataclass\n\n\n@dataclass(frozen=True)\nclass ByLoss:\n"
        "    def next_ratio(self, current, target, loss_at):\n"
        "        return max(target, current - 0.5 * loss_at(target) / loss_at(target))\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    done = cli(*tiny, "experiment=svd_llm", "schedule._target_=my_schedule.ByLoss", "hydra.run.dir=run")
    assert done.status == 0, done.err
    assert "could not be estimated (ZeroDivisionError: float division by zero); it goes" in " ".join(done.err.split())
    record = read_record(tmp_path / "run")
    assert record.status == "completed" and "estimated" not in record.cost
