"""What may be compared stands together, what varies becomes a column, what was run twice is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bs_exp.records.record import RunRecord, Status
from bs_exp.reporting.collect import Collection, Found
from bs_exp.reporting.results import result_tables
from bs_exp.reporting.runs import problems
from bs_exp.reporting.study import Study, arrange
from bs_exp.reporting.table import to_csv
from tests.support import synthetic


def _study(*records: RunRecord) -> Study:
    return arrange(Collection(tuple(Found(r, Path(f"runs/{i}")) for i, r in enumerate(records)), (), (), ()))


def _series(study: Study) -> list[tuple[str, int]]:
    return [(series.label, len(series.points)) for section in study.sections for series in section.series]


def test_what_varies_besides_the_ratio_makes_series_and_columns() -> None:
    records = [synthetic.record("basis_sharing", r, group_size=g) for g in (2, 4) for r in (0.2, 0.4)]
    study = _study(*records, synthetic.record("svd_llm", 0.2))
    (section,) = study.sections
    assert section.dials == ("group_size",)
    assert _series(study) == [
        ("basis_sharing · group_size 2", 2),
        ("basis_sharing · group_size 4", 2),
        ("svd_llm", 1),
    ]
    assert section.ratios == [0.2, 0.4]


def test_what_methods_are_made_of_is_no_column() -> None:
    study = _study(*(synthetic.record(method, 0.2) for method in synthetic.METHODS))
    assert study.sections[0].dials == ()


def test_a_setting_that_follows_from_another_is_no_column() -> None:
    windows = {"calibration.num_sequences": 8, "calibration.set.num_sequences": 8}
    study = _study(synthetic.record(), synthetic.record(changes=windows))
    assert study.sections[0].dials == ("num_sequences",)


def test_an_option_is_shown_by_its_name_and_stands_for_its_dials() -> None:
    other: dict[str, Any] = {"sharing": {"_target_": "bs_exp.sharing.adjacent.Adjacent", "group_size": 3}}
    study = _study(synthetic.record(), synthetic.record(changes=other))
    assert study.sections[0].dials == ("sharing",)
    assert [series.values for series in study.sections[0].series] == [("none",), ("adjacent",)]
    named = _study(
        synthetic.record(choices={"sharing": "none"}), synthetic.record(changes=other, choices={"sharing": "all"})
    )
    assert [series.values for series in named.sections[0].series] == [("none",), ("all",)]


def test_dials_of_one_name_are_told_apart() -> None:
    changes = [{"update.seed": 1, "importance.seed": 2}, {"update.seed": 2, "importance.seed": 2}]
    changes.append({"update.seed": 1, "importance.seed": 3})
    study = _study(*(synthetic.record(changes=change) for change in changes))
    assert set(study.sections[0].dials) == {"update.seed", "importance.seed"}


def test_other_models_and_other_evaluations_are_never_compared() -> None:
    study = _study(
        synthetic.record(),
        synthetic.record(changes={"evaluation.sequence_length": 512}),
        synthetic.record(hub="huggyllama/llama-7b"),
        synthetic.record(changes={"model.device": "cuda"}),  # changes speeds only
    )
    assert [section.title for section in study.sections] == [
        "demo · sequence_length 2048",
        "demo · sequence_length 512",
        "huggyllama/llama-7b",
    ]
    assert [len(section.points) for section in study.sections] == [2, 1, 1]


def test_other_texts_are_never_compared() -> None:
    first, second = synthetic.record(removed=0.2), synthetic.record(removed=0.4)
    dense = {**second.metrics["dense"], "ppl_text_sha256/wikitext2": "f" * 64}
    other = synthetic.record(removed=0.4, metrics={**second.metrics, "dense": dense})
    failed = synthetic.record(removed=0.6, status=Status.FAILED, metrics={})
    study = _study(first, other, failed)
    assert [len(section.points) for section in study.sections] == [2, 1]
    assert study.sections[0].points[1].record is failed


def test_the_last_completed_of_repeated_runs_is_shown() -> None:
    early = synthetic.record(ppl=9.0, finished="2026-01-01T00:00:00+00:00")
    late = synthetic.record(ppl=8.0, finished="2026-01-03T00:00:00+00:00")
    failed = synthetic.record(status=Status.FAILED, finished="2026-01-04T00:00:00+00:00")
    study = _study(late, failed, early)
    (series,) = study.sections[0].series
    assert [point.record for point in series.points] == [late]
    (repeat,) = study.repeats
    assert [point.number for point in repeat.points] == [1, 3, 2]
    assert repeat.same_hash


def test_best_ignores_what_cannot_be_ranked() -> None:
    study = _study(
        synthetic.record("svd", ppl=float("nan")),
        synthetic.record("svd_llm", ppl=9.0),
        synthetic.record("best", ppl=float("inf")),
        synthetic.record("drank", status=Status.FAILED),
    )
    (section,) = study.sections
    best = section.best(0.2, "ppl/wikitext2")
    assert best is not None and best.method == "svd_llm"
    assert section.best(0.9, "ppl/wikitext2") is None


def test_objective_ranks_where_all_agree() -> None:
    assert _study(synthetic.record()).sections[0].main_metric == "ppl/wikitext2"
    asked = synthetic.record(changes={"objective": "acc/mean"})
    assert _study(asked).sections[0].main_metric == "acc/mean"
    several = synthetic.record(changes={"objective": ["acc/mean", "size/bytes"]})
    assert _study(several).sections[0].main_metric == "ppl/wikitext2"


def test_a_run_that_failed_before_it_had_a_model_is_kept() -> None:
    bare = synthetic.record(status=Status.FAILED, config={"name": "svd", "retain_ratio": "???"}, metrics={})
    study = _study(bare)
    assert study.sections[0].points[0].removed is None
    assert study.sections[0].main_metric is None


def _made_from(ratio: float, windows: str, weights: str, code: str | None = None) -> RunRecord:
    record = synthetic.record("svd_llm", ratio)
    noted = {
        "calibration": {"sha256": windows},
        "model": {**record.provenance.get("model", {}), "fingerprint": weights},
    }
    if code:
        noted["code"] = {"mine.Gram": {"mine": code}}
    return replace(record, provenance={**record.provenance, **noted})


def test_what_was_made_from_other_texts_or_code_is_a_row_of_its_own() -> None:
    """Settings hold the name of a file alone."""
    one = [_made_from(ratio, "a" * 64, "m") for ratio in (0.2, 0.4)]
    assert _study(*one).mixtures == () and _study(*one).sections[0].dials == ()
    study = _study(*one, _made_from(0.5, "b" * 64, "m"))
    assert study.sections[0].dials == ("made from",)
    assert _series(study) == [("svd_llm · made from windows aaaaaaaa", 2), ("svd_llm · made from windows bbbbbbbb", 1)]
    (table,) = [table for table in problems(study) if table.key == "mixed"]
    assert "windows aaaaaaaa; windows bbbbbbbb" in to_csv(table)
    ours = to_csv(next(result_tables(study.sections[0], "m1")))
    assert "windows aaaaaaaa" in ours and "windows bbbbbbbb" in ours
    assert "NOT COMPARABLE" in next(result_tables(study.sections[0], "m1")).note
    assert study.sections[0].best(0.2, "ppl/wikitext2") is None
    coded = _study(*(_made_from(ratio, "a" * 64, "m", code) for ratio, code in ((0.2, "x"), (0.4, "y"))))
    assert len(coded.sections[0].series) == 2 and coded.mixtures[0].what == "calibration text or code"


def test_other_weights_under_the_same_name_are_never_compared() -> None:
    study = _study(*(_made_from(ratio, "a" * 64, weights * 64) for ratio, weights in ((0.2, "m"), (0.4, "n"))))
    assert [section.title.rpartition(" · ")[2] for section in study.sections] == [
        "weights mmmmmmmm",
        "weights nnnnnnnn",
    ]
    assert study.mixtures[0].kinds == ("mmmmmmmm", "nnnnnnnn")
