"""Whole runs of the command line on models that are no decoders: load, calibrate, compress, evaluate, save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, BertConfig, BertModel

import bs_exp  # noqa: F401  registers the plug-in with which compressed models load
from bs_exp.models.tiny import byte_tokenizer
from bs_exp.records.record import read_record
from bs_exp.reporting.collect import collect
from bs_exp.reporting.study import arrange
from bs_exp.types import Task
from tests.support.encoders import headless

Cli = Callable[..., Any]


@pytest.fixture
def settings(texts: Path) -> tuple[str, ...]:
    """Calibration and evaluation on the two texts, in windows of 64 tokens."""
    return (
        "calibration=text",
        f"calibration.files=[{texts}/A.txt]",
        "calibration.num_sequences=16",
        "calibration.sequence_length=64",
        "corpus@evaluation.corpora.python_docs=text",
        f"evaluation.corpora.python_docs.files=[{texts}/B.txt]",
        "evaluation.sequence_length=64",
        "evaluation.max_windows=8",
        "tracking=none",
        "hydra.run.dir=out",
    )


@pytest.mark.parametrize(
    ("family", "evaluation", "metric", "auto"),
    [
        ("bert", "encoder", "masked_ppl/python_docs", AutoModelForMaskedLM),
        ("t5", "seq2seq", "seq2seq_ppl/python_docs", AutoModelForSeq2SeqLM),
    ],
)
def test_run(
    cli: Cli, settings: tuple[str, ...], tmp_path: Path, family: str, evaluation: str, metric: str, auto: Any
) -> None:
    model = ("model=tiny_random", f"model.family={family}")
    done = cli(*model, *settings, f"evaluation={evaluation}", "retain_ratio=0.6", "save_model=true")
    assert done.status == 0, done.err
    record = read_record(tmp_path / "out")
    dense, compressed = record.metrics["dense"], record.metrics["compressed"]
    assert dense["relative_error/python_docs"] == 0.0
    assert compressed["relative_error/python_docs"] > 0.0
    assert compressed["cosine/python_docs"] < 1.0 == pytest.approx(dense["cosine/python_docs"])
    assert record.objective == compressed[metric] != dense[metric]
    assert 0.5 < record.size["retain_ratio"] <= 0.6
    assert record.provenance["model"]["task"] == {"bert": "masked_lm", "t5": "seq2seq_lm"}[family]
    matrices = {group["matrix"] for group in record.plan["groups"]}  # type: ignore[index]
    assert ("cross_k" in matrices) == (family == "t5")
    loaded = auto.from_pretrained(tmp_path / "out" / "model")
    written = {"decoder_input_ids": torch.tensor([[256, 5]])} if family == "t5" else {}
    assert loaded(input_ids=torch.tensor([[1, 2, 3]]), **written).logits.isfinite().all()


def test_an_encoder_without_a_head(cli: Cli, settings: tuple[str, ...], tmp_path: Path) -> None:
    """Judged by its outputs; what needs logits is refused before any work."""
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=259
    )
    BertModel(config).save_pretrained(tmp_path / "dense")
    byte_tokenizer(Task.MASKED_LM).save_pretrained(tmp_path / "dense")
    model = ("model=local", f"model.path={tmp_path}/dense")
    done = cli(*model, *settings, "evaluation=similarity")
    assert done.status == 0, done.err
    record = read_record(tmp_path / "out")
    assert 0.0 < record.metrics["compressed"]["relative_error/python_docs"] < 1.0
    assert record.objective == record.metrics["compressed"]["cosine/python_docs"]
    refused = cli(*model, *settings, "evaluation=similarity", "experiment=fwsvd", "hydra.run.dir=refused")
    assert refused.status == 1
    assert "FisherRowsWhitening, made from gradients of the loss, needs logits" in refused.err
    assert "similarity (dense)" not in refused.err


@pytest.mark.parametrize("kind", ["headless", "bert", "t5"])
def test_best_recovered_serves_every_task(cli: Cli, settings: tuple[str, ...], tmp_path: Path, kind: str) -> None:
    """Nothing is set for them but the evaluation; steps are fewer, to be quick."""
    dense, evaluation = ("model=tiny_random", f"model.family={kind}"), {"bert": "encoder", "t5": "seq2seq"}.get(kind)
    if kind == "headless":
        headless().module.save_pretrained(tmp_path / "dense")
        byte_tokenizer(Task.MASKED_LM).save_pretrained(tmp_path / "dense")
        dense, evaluation = ("model=local", f"model.path={tmp_path}/dense"), "similarity"
    quick = ("retain_ratio=0.9", "update.updates.recover.steps=4", "update.updates.recover.evaluate_every=2")
    done = cli(*dense, *settings, f"evaluation={evaluation}", "experiment=best_recovered", *quick)
    assert done.status == 0, done.err
    record = read_record(tmp_path / "out")
    assert record.plan is not None
    assert {group["loss_unit"] for group in record.plan["groups"]} == {"cosine" if kind == "headless" else "nats"}
    recovery = record.update["updates"][1] if "updates" in record.update else record.update["recover"]
    assert recovery["generated_windows"] == 0
    assert f"held_out_{'cosine' if kind == 'headless' else 'kl'}_after" in recovery


@pytest.mark.parametrize(
    ("family", "evaluation", "metric"),
    [
        ("bert", "encoder", "masked_ppl/python_docs"),
        ("t5", "seq2seq", "seq2seq_ppl/python_docs"),
        ("bert", "similarity", "cosine/python_docs"),
    ],
)
def test_a_sweep_is_ranked_by_what_the_model_can_be_judged_by(
    cli: Cli, settings: tuple[str, ...], tmp_path: Path, family: str, evaluation: str, metric: str
) -> None:
    model = ("model=tiny_random", f"model.family={family}", "model.layers=2", "experiment=svd_llm,svd")
    done = cli("-m", *model, *settings, f"evaluation={evaluation}", "retain_ratio=0.4", "hydra.sweep.dir=sweep")
    assert done.status == 0, done.err
    records = {p: read_record(p).metrics["compressed"][metric] for p in tmp_path.glob("sweep/*/")}
    assert len(set(records.values())) == 2
    best = (max if metric.startswith("cosine") else min)(records.values())
    assert all(read_record(folder).objective == value for folder, value in records.items())
    (header,) = [line.split() for line in done.out.splitlines() if line.split()[:1] == ["point"]]
    assert header == ["point", "outcome", metric, "kept", "time", "folder"]
    winner = next(read_record(folder) for folder, value in records.items() if value == best)
    assert (
        f"best     {metric} {best:.5g} with {winner.size['retain_ratio']:.1%} kept: experiment={winner.name}\n"
        in done.out
    )
    (section,) = arrange(collect([tmp_path / "sweep"])).sections
    assert section.main_metric == metric
    report = cli("report", "sweep")
    assert report.status == 0, report.err
    assert (tmp_path / "sweep" / "report" / "tables" / f"m1-{metric.replace('/', '-')}.csv").is_file()
