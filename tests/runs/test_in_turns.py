"""Runs time the dense and the compressed model in one stage, and say of both what was found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bs_exp.records.record import read_record
from bs_exp.reporting.collect import collect
from bs_exp.reporting.cost import phases
from bs_exp.reporting.study import arrange

Cli = Callable[..., Any]
RATES = ("throughput/prefill_tok_s", "throughput/decode_tok_s")


def test_one_stage_times_both_and_its_rates_can_be_objectives(
    cli: Cli, tiny: tuple[str, ...], texts: Path, tmp_path: Path
) -> None:
    settings = [s for s in tiny if not s.startswith("evaluation")]
    done = cli(
        *settings, "evaluation=smoke", "evaluation.parts=[throughput]", "evaluation.repeats=6",
        "objective=throughput/decode_tok_s", "retain_ratio=0.6,0.5", "hydra.sweep.dir=sweep", "-m",
    )  # fmt: skip
    assert done.status == 0, done.err
    records = [read_record(path) for path in sorted((tmp_path / "sweep").glob("*/record.json"))]
    assert len(records) == 2
    for record in records:
        dense, compressed = record.metrics["dense"], record.metrics["compressed"]
        assert dense["throughput/timed"] == compressed["throughput/timed"] == "in turns"
        assert record.objective == compressed["throughput/decode_tok_s"]
        assert "throughput (both)" in record.timings
        assert not {"throughput (dense)", "throughput (compressed)"} & record.timings.keys()
        assert "dense_metrics" not in record.provenance  # every point times the dense model beside its own
        for rate, paid in zip(RATES, ("prefill", "decode"), strict=True):
            assert dense[rate] > 0 and compressed[f"{rate}_speedup"] > 0
            measured = compressed[f"{rate}_difference"] != "no difference measured"
            assert (f"cost/break_even_{paid}_tokens" in compressed) <= measured
    assert records[0].metrics["dense"][RATES[0]] != records[1].metrics["dense"][RATES[0]]
    (section,) = arrange(collect([tmp_path / "sweep"])).sections
    assert all("evaluate both" in phases(point) for point in section.points)


def test_an_objective_that_nobody_measures_is_refused_before_compression(
    cli: Cli, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    settings = [s for s in tiny if not s.startswith("evaluation")]
    done = cli(
        *settings,
        "evaluation=smoke",
        "evaluation.parts=[throughput]",
        "objective=throughput/decode",
        "hydra.run.dir=run",
    )
    assert done.status != 0
    assert "throughput/decode_tok_s" in done.err  # told by name
    assert not list(tmp_path.glob("x/record.json")) or "compress" not in read_record(tmp_path / "x").timings
