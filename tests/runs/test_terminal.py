"""The report can be read at 80 columns, in a pipe, and from any record."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from bs_exp.records.record import RunRecord, Status
from bs_exp.runs.recorder import new_record
from bs_exp.runs.terminal import print_report
from bs_exp.types import PlannedGroup, RankPlan, WeightGroup

FOLDER = Path("/a/rather/long/path/to/some/place/below/which/the/runs/of/a/project/are/kept/basis_sharing/run-1")


@pytest.fixture
def record() -> RunRecord:
    group = PlannedGroup(WeightGroup("q", (0, 1), 10, 10), 3, 158, 0.0, 0.0)
    return dataclasses.replace(
        new_record(name="basis_sharing", config={}, config_hash="0" * 64, folder=FOLDER),
        status=Status.COMPLETED,
        plan=RankPlan((group,), 0.8).to_dict(),
        metrics={
            "dense": {
                "ppl/python_docs": 25.0,
                "ppl_text_sha256/python_docs": "0123456789abcdef" * 4,
                "acc/docs_cloze": 0.5,
                "acc_stderr/docs_cloze": 0.01,
                "throughput/decode_tok_s": 1234.5,
                "throughput/decode_tok_s_min": 1200.0,
                "throughput/decode_tok_s_max": 1250.0,
                "items/docs_cloze": 8,
                "throughput/batch_size": 4,
            },
            "compressed": {
                "ppl/python_docs": 30.0,
                "ppl_text_sha256/python_docs": "0123456789abcdef" * 4,
                "acc/docs_cloze": 0.4,
                "acc_stderr/docs_cloze": 0.012,
                "throughput/decode_tok_s": 1000.0,
                "throughput/decode_tok_s_min": 990.0,
                "throughput/decode_tok_s_speedup": 0.81,
                "throughput/decode_tok_s_difference": "slower",
                "throughput/batch_size": 4,
            },
        },
        size={"parameters": 800, "dense_parameters": 1000, "bytes": 3200, "dense_bytes": 4000},
        timings={"load": 1.25, "allocate": 0.001, "evaluate": 600.0},
        cache={"hits": {"decomposition": 16}},
        model_folder="model",
    )


def _printed(record: RunRecord, width: int | None = None) -> str:
    file = io.StringIO()
    print_report(record, FOLDER, Console(file=file, width=width))
    return file.getvalue()


def test_dense_and_compressed_stand_side_by_side(record: RunRecord) -> None:
    text = _printed(record)
    assert re.search(r"ppl/python_docs +25 +30 +\+20\.0%", text)
    assert re.search(r"acc/docs_cloze +0\.5 ± 0\.01 +0\.4 ± 0\.012 +-10\.0 pt", text)
    assert re.search(r"throughput/decode_tok_s +1,23\d +1,000 +-19\.0%", text)
    assert re.search(r"parameters +1,000 +800 +-20\.0%", text)
    assert "acc_stderr" not in text


def test_provenance_stays_in_the_record(record: RunRecord) -> None:
    text = _printed(record)
    for word in ("sha256", "batch_size", "items", "_min", "_max", "settings"):
        assert word not in text
    assert text.count("throughput/") == 1  # one row for each rate


def test_tokens_without_a_finite_loss_are_told(record: RunRecord) -> None:
    metrics = {
        "dense": {"ppl/text": 25.0, "ppl_nonfinite/text": 0},
        "compressed": {"ppl/text": 30.0, "ppl_nonfinite/text": 3},
    }
    assert re.search(r"ppl_nonfinite/text +0 +3", _printed(dataclasses.replace(record, metrics=metrics)))
    none = {label: {**found, "ppl_nonfinite/text": 0} for label, found in metrics.items()}
    assert "nonfinite" not in _printed(dataclasses.replace(record, metrics=none))


def test_cost_is_one_line(record: RunRecord) -> None:
    cost = {
        "cost/compression_s": 1.957,
        "cost/break_even_prefill_tokens": 12345.6,
        "cost/break_even_decode_tokens": math.inf,
    }
    metrics = {**record.metrics, "compressed": {**record.metrics["compressed"], **cost}}
    text = " ".join(_printed(dataclasses.replace(record, metrics=metrics)).split())
    assert "cost compressed in 2.0 s; paid for after 12,346 tokens of prefill; no gain of speed in decode" in text
    assert "cost/" not in text


def test_a_rate_has_one_row_and_a_change_only_where_one_was_measured(record: RunRecord) -> None:
    undecided = {**record.metrics["compressed"], "throughput/decode_tok_s_difference": "no difference measured"}
    text = _printed(dataclasses.replace(record, metrics={**record.metrics, "compressed": undecided}))
    assert re.search(r"throughput/decode_tok_s +1,23\d +1,000 +no difference measured", text)
    assert text.count("throughput/decode") == _printed(record).count("throughput/decode") == 1
    assert max(len(line) for line in text.splitlines() if str(FOLDER) not in line) <= 80


def test_facts_follow(record: RunRecord) -> None:
    text = _printed(record)
    assert "79.0% of the targeted parameters (asked: 80.0%)" in text
    assert "1 group, 1 with a shared basis" in " ".join(text.split())
    assert "load 1.2 s, evaluate 10.0 min" in " ".join(text.split())
    assert "16 decompositions reused" in text
    assert f"record   {FOLDER}/record.json\n" in text
    assert f"model    {FOLDER}/model\n" in text


def test_fits_eighty_columns_but_never_breaks_a_path(record: RunRecord) -> None:
    lines = _printed(record).splitlines()
    assert max(len(line) for line in lines if str(FOLDER) not in line) <= 80
    assert not [line for line in lines if line != line.rstrip()]
    assert "\x1b" not in "".join(lines)


def test_infinite_perplexity_is_shown_as_such(record: RunRecord) -> None:
    metrics = {"dense": {"ppl/text": 25.0}, "compressed": {"ppl/text": math.inf}}
    assert re.search(r"ppl/text +25 +inf *$", _printed(dataclasses.replace(record, metrics=metrics)), re.MULTILINE)


def test_half_a_record_can_be_shown(record: RunRecord) -> None:
    bare = new_record(name="failed", config={}, config_hash="0" * 64, folder=FOLDER)
    assert "record.json" in _printed(bare)
    dense_only = dataclasses.replace(bare, metrics={"dense": record.metrics["dense"]})
    assert re.search(r"ppl/python_docs +25 +-", _printed(dense_only))


def test_real_plan_is_understood(record: RunRecord) -> None:
    group = PlannedGroup(WeightGroup("q", (0,), 4, 4), None, 16, 0.0, 0.0)
    plan = RankPlan((group,), 1.0).to_dict()
    text = _printed(dataclasses.replace(record, plan=plan))
    assert "1 group, 0 with a shared basis" in " ".join(text.split())
