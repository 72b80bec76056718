"""Reported numbers stand beside measured ones where model, ratio and metric agree, and never without what differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bs_exp.records.pairs import PairTable
from bs_exp.records.record import RunRecord
from bs_exp.reporting.collect import Collection, Found
from bs_exp.reporting.literature import literature
from bs_exp.reporting.papers import PaperComparison, compare, measured_value, paper_tables
from bs_exp.reporting.study import Study, arrange
from tests.support import synthetic

LLAMA = "huggyllama/llama-7b"


def _study(*records: RunRecord) -> Study:
    return arrange(Collection(tuple(Found(r, Path(f"runs/{i}")) for i, r in enumerate(records)), (), (), ()))


def _compared(metric: str, *records: RunRecord, place: str | None = None) -> list[PaperComparison]:
    found = [c for c in compare(_study(*records)) if c.reported.metric == metric and c.series is not None]
    return [c for c in found if place is None or c.reported.place == place]


def test_the_stored_numbers_are_sound() -> None:
    known = literature()
    assert len(known.rows) > 1500
    for row in known.rows:
        assert row.models and row.protocol in known.protocols
        assert 0 <= row.removed < 1
        low, high = {
            "ppl": (1, 1e6),
            "word_perplexity": (1, 1e6),
            "speedup": (1, 10),
            "seconds": (1, 1e5),
        }.get(row.metric.partition("/")[0], (0, 1))
        assert low <= row.value <= high, row
        # Where and how a time was taken; a table that does not say so may not stand beside ours.
        assert bool(row.speed) == row.metric.startswith("speedup/")
        assert set(row.speed) <= {"device", "batch_size", "prompt_length", "generated_length"}
        assert set(row.where) <= {"allocation.beta"}
    assert {method.method for method in known.methods} <= {row.method for row in known.rows}


def test_stored_layer_shares_keep_what_they_say() -> None:
    """The layers of a model are equal, so that their shares have the ratio as their mean."""
    for entry in literature().layer_shares:
        assert sum(entry.shares) / len(entry.shares) == pytest.approx(1 - entry.removed, abs=1e-5)
        assert all(0 < share < 1 for share in entry.shares)


def test_stored_pairs_say_where_sharing_pays() -> None:
    assert {pair.matrix: pair.ratio < 1 for pair in literature().pairs} == {"k": True, "o": False}


def test_basis_sharing_on_llama_7b_meets_table_1() -> None:
    (found,) = _compared("ppl/wikitext2", synthetic.record("basis_sharing", 0.2, hub=LLAMA, ppl=8.0), place="Table 1")
    assert (found.measured, found.reported.value) == (8.0, 7.74)
    (table, *_) = paper_tables(_study(found.point.record), compare(_study(found.point.record)))
    row = next(r for r in table.rows if r.kind == "dense" and "Table 1" in r.cells[-1].text)
    dense = [r for r in table.rows if r.kind == "dense"]
    assert [cell.text for cell in row.cells[3:7]] == ["dense", "5.68", "5.68", "+0.0 %"]
    assert len(dense) > 3
    row = next(r for r in table.rows if r.cells[3].text == "basis_sharing" and "Table 1" in r.cells[-1].text)
    assert [cell.text for cell in row.cells[4:7]] == ["8.00", "7.74", "+3.4 %"]


@pytest.mark.parametrize(("size", "value"), [(3, 7.72), (4, 7.65), (5, 7.62)])
def test_group_sizes_are_not_mixed(size: int, value: float) -> None:
    found = _compared("ppl/wikitext2", synthetic.record("basis_sharing", 0.2, hub=LLAMA, group_size=size))
    assert {c.reported.value for c in found if c.reported.place == "Table 6"} == {value}
    assert not [c for c in found if c.reported.place == "Table 1"]


@pytest.mark.parametrize(
    "record",
    [
        synthetic.record("basis_sharing", 0.25, hub=LLAMA),  # a ratio that no table has
        synthetic.record("basis_sharing", 0.2, hub="someone/llama-7b"),
        synthetic.record("basis_sharing", 0.2),
        synthetic.record("best", 0.2, hub=LLAMA),  # a method that no paper has
        synthetic.record("basis_sharing", 0.2, hub=LLAMA, changes={"update._target_": "bs_exp.update.recover.Recover"}),
    ],
)
def test_what_does_not_agree_is_not_compared(record: RunRecord) -> None:
    assert not _compared("ppl/wikitext2", record)


def test_fine_tuned_rows_of_a_paper_are_not_the_bare_method() -> None:
    found = _compared("ppl/wikitext2", synthetic.record("svd_llm", 0.2, hub=LLAMA))
    assert {c.reported.value for c in found if c.reported.protocol == "svd_llm"} == {7.94}
    tuned = synthetic.record("svd_llm", 0.2, hub=LLAMA, changes={"update._target_": "bs_exp.update.lora.LoRA"})
    found = _compared("ppl/wikitext2", tuned)
    assert {c.reported.value for c in found} == {7.73, 7.79}
    (other,) = (c for c in found if c.reported.value == 7.79)
    assert "calibration text: wikitext2 here, c4 there" in other.differences


def _differences(record: RunRecord, metric: str = "ppl/wikitext2") -> str:
    (found,) = _compared(metric, record, place="Table 1")
    return "; ".join(found.differences)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluation.tail": "drop"}, "last, shorter window: drop here, keep there"),
        ({"evaluation.average": "tokens"}, "mean over: tokens here, windows there"),
        ({"evaluation.sequence_length": 512}, "window length: 512 here, 2048 there"),
        ({"evaluation.max_windows": 16}, "perplexity of 16 windows only"),
        ({"calibration.corpus.path": "allenai/c4"}, "calibration text: c4 here, wikitext2 there"),
        ({"whitening._target_": "bs_exp.whitening.two_sided.T"}, "whitening: two_sided here, gram there"),
    ],
)
def test_differences_of_protocol_are_named(changes: dict[str, Any], words: str) -> None:
    same = synthetic.record("basis_sharing", 0.2, hub=LLAMA)
    assert words not in _differences(same)
    assert words in _differences(synthetic.record("basis_sharing", 0.2, hub=LLAMA, changes=changes))


def test_differences_that_the_run_shows_are_named() -> None:
    record = synthetic.record("basis_sharing", 0.4, hub=LLAMA)
    assert "coefficients are updated there from 40 % removed on, not here" in _differences(record)
    model = {**record.provenance, "model": {"dtype": "bfloat16"}, "calibration": {"windows": 8}}
    words = _differences(replace(record, provenance=model, size={**record.size, "retain_ratio": 0.58}))
    assert "dtype: bfloat16 here, float32 there" in words
    assert "calibration windows: 8 here, 256 there" in words
    assert "58 % kept here, 60 % asked for" in words
    assert "lm-eval: 0.4.13 here, 0.4.3 there" in _differences(record, "acc/piqa")
    assert "lm-eval" not in _differences(record)
    assert "reported: its calibration windows hold one BOS per row" in words


def test_means_are_taken_over_the_tasks_of_the_paper() -> None:
    tasks = ["openbookqa", "arc_easy", "arc_challenge", "winogrande", "hellaswag", "piqa", "mathqa"]
    found: dict[str, Any] = {f"acc/{task}": i / 10 for i, task in enumerate(tasks)}
    assert measured_value(found, "mean7") == pytest.approx(0.3)
    assert measured_value(found, "mean6") == pytest.approx((2.1 - 0.2) / 6)
    del found["acc/mathqa"]
    assert measured_value(found, "mean7") is None


def test_all_that_is_reported_stands_beside_what_was_measured() -> None:
    study = _study(synthetic.record("best", 0.2, hub=LLAMA, ppl=6.5), synthetic.record("best", 0.4, hub=LLAMA, ppl=9.0))
    tables = {table.key: table for table in paper_tables(study, compare(study))}
    table = tables["m1-reported-ppl-wikitext2"]
    assert [column.title for column in table.columns] == ["method", "from", "80 % (\u221220 %)", "60 % (\u221240 %)"]
    assert [cell.text for cell in table.rows[0].cells] == ["best", "measured", "6.50", "9.00"]
    rows = {(row.cells[0].text, row.cells[1].text): row for row in table.rows}
    dobi = rows["Dobi-SVD", "SAES-SVD, Table 1 (arXiv 2602.03051)"]
    assert [cell.text for cell in dobi.cells[2:]] == ["8.54", "13.54"]


def test_rows_that_stand_for_a_dial_meet_runs_with_that_dial() -> None:
    def found(**changes: Any) -> dict[float, PaperComparison]:
        dials = {f"allocation.{key}": value for key, value in changes.items()}
        record = synthetic.record("drank", 0.2, hub=LLAMA, group_size=3, changes=dials)
        return {c.reported.value: c for c in _compared("ppl/wikitext2", record, place="Table 5")}

    assert list(found(beta=0.4)) == [7.39]
    assert list(found(beta=0.2)) == [7.53]
    assert list(found(beta=0.1)) == list(found()) == []


GPU = {"throughput/device": "NVIDIA A100-SXM4-80GB"}


def _timed(method: str, removed: float, *, device: str = "cuda:0", **more: Any) -> RunRecord:
    """A run whose compressed model is twice as fast on prompts and four times as fast from then on."""
    record = synthetic.record(method, removed, hub=LLAMA)
    speeds = {"throughput/prefill_tok_s": 1000.0, "throughput/decode_tok_s": 10.0}
    faster = {"throughput/prefill_tok_s": 2000.0, "throughput/decode_tok_s": 40.0}
    faster |= synthetic.speedup("throughput/prefill_tok_s", 2.0) | synthetic.speedup("throughput/decode_tok_s", 4.0)
    named = GPU if device != "cpu" else {}
    metrics: Mapping[str, Any] = {
        "dense": {**record.metrics["dense"], **speeds, **named},
        "compressed": {**record.metrics["compressed"], **faster, **named},
    }
    model = {**record.provenance["model"], "device": device}
    hardware = {**record.hardware, "gpus": [{"name": named["throughput/device"]}] if named else []}
    return replace(record, metrics=metrics, provenance={**record.provenance, "model": model}, hardware=hardware, **more)


def test_speedups_are_compared_on_accelerators_with_their_settings() -> None:
    (found,) = _compared("speedup/prefill", _timed("basis_sharing", 0.5))
    assert (found.measured, found.reported.value) == (pytest.approx(2.0), 1.57)
    assert {"batch: 8 here, 512 there", "prompt tokens: 256 here, 32 there"} <= set(found.differences)
    assert not [words for words in found.differences if words.startswith("device")]
    (found,) = _compared("speedup/generate", _timed("svd_llm_v2", 0.4))
    # 256 prompt and 64 generated tokens: 0.256 s + 6.4 s against 0.128 s + 1.6 s.
    assert (found.measured, found.reported.value) == (pytest.approx(6.656 / 1.728), 1.63)
    assert not _compared("speedup/prefill", _timed("basis_sharing", 0.5, device="cpu"))


def test_no_speedup_is_compared_where_no_difference_was_measured() -> None:
    record = _timed("basis_sharing", 0.5)
    for changed in ({"throughput/prefill_tok_s_difference": "no difference measured"}, None):
        found = {
            name: value
            for name, value in record.metrics["compressed"].items()
            # As in records of runs that did not time in turns.
            if changed or not name.endswith(("_difference", "_speedup"))
        }
        metrics = {**record.metrics, "compressed": {**found, **(changed or {})}}
        assert not _compared("speedup/prefill", replace(record, metrics=metrics))


def test_seconds_of_compression_are_compared_on_accelerators() -> None:
    found = _compared("seconds/compress", _timed("svd_llm", 0.2))
    assert {c.reported.value: c.reported.hardware for c in found} == {
        900: "NVIDIA A100",
        757: "NVIDIA GeForce RTX 5090",
    }
    words = {c.reported.value: c.differences for c in found}
    assert all(c.measured == 5.0 for c in found)
    assert not [w for w in words[900] if w.startswith(("hardware", "some Grams"))]
    assert {
        "hardware: NVIDIA A100-SXM4-80GB here, NVIDIA GeForce RTX 5090 there",
        "calibration text: wikitext2 here, c4 there",
    } <= set(words[757])
    (reused, _) = _compared("seconds/compress", _timed("svd_llm", 0.2, cache={"hits": {"gram": 3}}))
    assert "some Grams or decompositions came from a cache here" in reused.differences
    assert not _compared("seconds/compress", _timed("svd_llm", 0.2, device="cpu"))


def test_rows_of_one_method_and_table_do_not_cover_each_other() -> None:
    study = _study(synthetic.record("svd_llm", 0.2, hub=LLAMA))
    tables = {table.key: table for table in paper_tables(study, compare(study))}
    rows = {row.cells[0].text: row.cells[2].text for row in tables["m1-reported-ppl-wikitext2"].rows}
    assert (rows["SVD-LLM, calibrated on wikitext2"], rows["SVD-LLM, calibrated on c4"]) == ("7.73", "7.79")
    assert (rows["D-Rank, group 4, beta 0.35"], rows["D-Rank, group 4, beta 0.3"]) == ("7.35", "7.37")


def test_pairs_of_layers_stand_beside_those_of_the_paper() -> None:
    for removed, count in ((0.2, 2), (0.4, 0)):
        record = synthetic.record("svd_llm", removed, hub="meta-llama/Llama-2-7b-hf")
        pairs = tuple(
            PairTable(matrix, (8, 9), ((None, 0.0), (0.0, None)), Path("runs/0"), "norm", {(8, 9): ratio})
            for matrix, ratio in (("q", 0.5), ("k", 0.95), ("o", 1.1))
        )
        study = replace(_study(record), pairs=pairs)
        tables = [table for table in paper_tables(study, compare(study)) if table.key == "papers-pairs"]
        rows = [[cell.text for cell in row.cells[1:]] for table in tables for row in table.rows]
        assert (
            rows
            == [
                ["80 % (\u221220 %)", "k", "8 and 9", "0.950", "0.927", "+2.5 %"],
                ["80 % (\u221220 %)", "o", "8 and 9", "1.100", "1.148", "-4.2 %"],
            ][:count]
        )
