"""Tables say what the records say: papers' layout, the best, costs, ranks; CSV exactly, Markdown safely."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from pathlib import Path

import pytest

from bs_exp.records.record import RunRecord, Status
from bs_exp.reporting import cost, ranks, results, runs
from bs_exp.reporting.collect import Collection, Found
from bs_exp.reporting.study import Section, arrange
from bs_exp.reporting.table import Cell, Column, Row, Table, mark_best, to_csv, to_markdown
from tests.support import synthetic


def _section(*records: RunRecord) -> Section:
    (section,) = arrange(_collection(*records)).sections
    return section


def _collection(*records: RunRecord) -> Collection:
    return Collection(tuple(Found(r, Path(f"runs/{i}")) for i, r in enumerate(records)), (), (), ())


def _texts(row: Row) -> list[str]:
    return [cell.text for cell in row.cells]


def test_methods_by_ratio_with_the_dense_row_first_and_the_best_bold() -> None:
    section = _section(
        synthetic.record("svd", 0.2, ppl=20061.0, group_size=0),
        synthetic.record("svd", 0.4, status=Status.FAILED, group_size=0),
        synthetic.record("svd_llm", 0.2, ppl=7.94, group_size=0),
        synthetic.record("svd_llm", 0.4, ppl=13.11, group_size=0),
        synthetic.record("best", 0.2, ppl=7.936, group_size=0),
    )
    table = next(results.result_tables(section, "m1"))
    assert [column.title for column in table.columns] == [
        "method",
        "80 % (\u221220 %)",
        "60 % (\u221240 %)",
        "kept exactly",
    ]
    assert [_texts(row) for row in table.rows] == [
        ["dense", "5.68", "5.68", ""],
        ["svd", "20,061", "failed", "80.00 % · -"],
        ["svd_llm", "7.94", "13.11", "80.00 % · 60.00 %"],
        ["best", "7.94", "-", "80.00 % · -"],
    ]
    assert [cell.best for row in table.rows for cell in row.cells[1:-1]] == [
        *(False, False),  # the dense model is not in the race
        *(False, False),
        *(True, False),  # the same as it is printed; alone in its column there is no best
        *(True, False),
    ]
    assert table.rows[1].cells[2].hint == "it went wrong"


def test_everything_measured_stands_by_ratio_with_what_was_kept() -> None:
    section = _section(*(synthetic.record(m, r, group_size=0) for m in ("svd", "best") for r in (0.4, 0.2)))
    table = list(results.result_tables(section, "m1"))[-1]
    titles = [column.title for column in table.columns]
    assert titles[:4] == ["kept (removed)", "method", "ppl wikitext2", "ppl ptb"]
    assert titles[-3:] == ["mean", "kept exactly", "size"]
    assert [_texts(row)[:2] for row in table.rows] == [
        ["", "dense"],
        ["80 % (\u221220 %)", "svd"],
        ["80 % (\u221220 %)", "best"],
        ["60 % (\u221240 %)", "svd"],
        ["60 % (\u221240 %)", "best"],
    ]
    best = {titles[i]: row.cells[i].best for row in table.rows[2:3] for i in range(len(titles))}
    assert best["ppl ptb"] and best["mean"]  # lower and higher


def test_a_search_over_many_ratios_has_no_columns_of_holes() -> None:
    section = _section(*(synthetic.record("best", 0.01 * i) for i in range(1, 30)))
    assert [table.key for table in results.result_tables(section, "m1")] == ["m1-all"]


@pytest.mark.parametrize(("lowest", "best"), [(True, [True, False, False]), (False, [False, True, False])])
def test_best_is_marked_among_numbers_only(lowest: bool, best: list[bool]) -> None:
    cells = [Cell("1", value=1.0), Cell("2", value=2.0), Cell("NaN", value=math.nan)]
    assert [cell.best for cell in mark_best(cells, [0.8, 0.8, 0.8], lowest=lowest)] == best


def test_the_best_is_marked_among_equal_sizes_only() -> None:
    cells = [Cell(str(value), value=value) for value in (1.0, 2.0, 3.0, 4.0, 0.5)]
    # 0.8 and 0.805 are within 1 %; 0.7 and 0.95 are alone, and of the last one nothing is known.
    marked = mark_best(cells, [0.95, 0.805, 0.8, 0.7, None], lowest=True)
    assert [cell.best for cell in marked] == [False, True, False, False, False]
    # Not across budgets: each has its own.
    marked = mark_best(cells, [0.9, 0.8, 0.8, 0.9, 0.8], lowest=True)
    assert [cell.best for cell in marked] == [True, False, False, False, True]


def test_the_summary_takes_the_best_of_equals() -> None:
    more = synthetic.record("best", 0.2, ppl=5.9, group_size=0)
    greedy = replace(more, size={**more.size, "retain_ratio": 0.9})
    equals = [synthetic.record(m, 0.2, ppl=ppl, group_size=0) for m, ppl in (("svd", 9.0), ("svd_llm", 7.0))]
    best = _section(greedy, *equals).best(0.2, "ppl/wikitext2")
    assert best is not None and best.method == "svd_llm"
    # Whole ranks that fall short of the budget are other sizes, and the larger group, but not what was asked for.
    short = [
        replace(record, size={**record.size, "retain_ratio": 0.79})
        for record in (synthetic.record(m, 0.2, ppl=8.0, group_size=0) for m in ("asvd", "fwsvd", "best"))
    ]
    best = _section(*equals, *short).best(0.2, "ppl/wikitext2")
    assert best is not None and best.method == "svd_llm"


def test_break_even_needs_more_than_noise() -> None:
    slower, clearly = synthetic.record(removed=0.1), synthetic.record(removed=0.5)
    barely = synthetic.record(removed=0.21)  # 1.01 times as fast, with an interval that holds 1
    tables = {table.title: table for table in cost.cost_tables(_section(slower, clearly, barely), "m1")}
    table = next(table for title, table in tables.items() if title.startswith("Break-even"))
    by_ratio = {row.cells[0].value: row.cells[-2] for row in table.rows}
    assert by_ratio[0.9].text == "never: slower"
    assert by_ratio[0.79].text == "no difference measured"
    assert by_ratio[0.5].value == pytest.approx(5.0 / (1 / 1500 - 1 / 1950))


def test_changes_of_speed_are_those_measured_in_turns() -> None:
    clearly, barely = synthetic.record(removed=0.5), synthetic.record(removed=0.21)
    apart = {k: v for k, v in clearly.metrics["compressed"].items() if not k.endswith(("_speedup", "_difference"))}
    old = synthetic.record(removed=0.6, metrics={**clearly.metrics, "compressed": apart})
    table = next(iter(cost.cost_tables(_section(clearly, barely, old), "m1")))
    decode = {row.cells[0].value: row.cells[-2] for row in table.rows if row.kind != "dense"}
    assert (decode[0.5].text, decode[0.5].hint) == ("+30.0 %", "1.280 to 1.319 times the dense speed")
    assert decode[0.79].text == decode[0.4].text == "no difference measured"


def test_no_second_is_counted_twice() -> None:
    (point,) = _section(synthetic.record()).points
    own = cost.own_timings(point)
    assert own["compress"] == pytest.approx(5.0 - 3.0 - 1.5)
    assert sum(own.values()) == pytest.approx(0.5 + 2.0 + 5.0)
    assert sum(cost.phases(point).values()) == pytest.approx(sum(own.values()))
    assert cost.compression_seconds(point) == 5.0


def test_speeds_of_other_settings_stand_in_tables_of_their_own() -> None:
    slow, fast = synthetic.record(removed=0.2), synthetic.record(removed=0.4)
    compressed = {**fast.metrics["compressed"], "throughput/device": "NVIDIA H100"}
    moved = synthetic.record(removed=0.4, metrics={**fast.metrics, "compressed": compressed})
    tables = [t for t in cost.cost_tables(_section(slow, moved), "m1") if t.title.startswith("Throughput")]
    assert [len(table.rows) for table in tables] == [2, 2]
    assert [("H100" in table.note) for table in tables] == [False, True]


def test_latency_is_a_step_of_the_whole_batch() -> None:
    table = next(iter(cost.cost_tables(_section(synthetic.record()), "m1")))
    assert table.columns[-1].title == "ms per token"
    assert table.rows[0].cells[-1].value == pytest.approx(1000 * 8 / 1500)


def test_ranks_stand_at_every_layer_of_a_group() -> None:
    record = synthetic.record("basis_sharing", 0.5, group_size=3, layers=4)
    table = ranks.rank_table(_section(record), "m1")
    assert table is not None and record.plan is not None
    assert [column.title for column in table.columns[-4:]] == [f"layer {i}" for i in range(4)]
    groups = [group["rank"] for group in record.plan["groups"] if group["matrix"] == "gate"]
    row = next(row for row in table.rows if row.cells[2].text == "gate")
    assert [cell.value for cell in row.cells[-4:]] == [groups[0]] * 3 + [groups[1]]


def test_experts_of_a_layer_have_their_mean_rank() -> None:
    record = synthetic.record("svd", 0.5, layers=2)
    assert record.plan is not None
    size = {"matrix": "expert_up", "d_in": 8, "d_out": 8, "predicted_loss": 0.0, "ridge": 0.0}
    experts = [
        {**size, "layers": [[0, 0], [0, 1]], "rank": 3, "parameters": 72},
        {**size, "layers": [[0, 2]], "rank": None, "parameters": 64},
        {**size, "layers": [[1, 0]], "rank": None, "parameters": 64},
    ]
    made = replace(record, plan={**record.plan, "groups": [*record.plan["groups"], *experts]})
    section = _section(made)
    found = ranks.places(section.points[0])
    # Dense is the full rank, 8: (3 + 3 + 8) / 3. Shares kept: 72 of 128 for two, and all of the third.
    assert (found["expert_up", 0].rank, found["expert_up", 0].shared) == (5, 2)
    assert found["expert_up", 0].kept == pytest.approx((2 * 72 / 128 + 1) / 3)
    assert found["expert_up", 1].rank is None
    table = ranks.rank_table(section, "m1")
    assert table is not None and "Experts have the mean of their layer." in table.note
    assert [column.title for column in table.columns[-2:]] == ["layer 0", "layer 1"]


def test_methods_that_agree_on_layers_correlate() -> None:
    def shares(record: RunRecord) -> list[float]:
        return ranks.layer_shares(_section(record).points[0])

    assert shares(synthetic.record("svd", 0.5, layers=5)) == pytest.approx([0.5] * 5, abs=0.03)
    records = [synthetic.record(m, 0.5, layers=12, group_size=1) for m in ("best", "drank", "svd")]
    (table,) = ranks.correlation_tables(_section(*records), "m1")
    assert [_texts(row)[1:3] for row in table.rows] == [["best", "drank"]]  # svd treats all layers alike
    assert table.rows[0].cells[-1].value == pytest.approx(1.0, abs=0.05)


def test_layer_shares_of_a_paper_stand_beside_the_measured_ones() -> None:
    llama, vicuna = "huggyllama/llama-7b", "lmsys/vicuna-7b-v1.3"
    records = [synthetic.record(m, 0.5, hub=llama, layers=32, group_size=1) for m in ("best", "svd")]
    agreement, shares = ranks.correlation_tables(_section(*records), "m1")
    assert [_texts(row)[1:3] for row in agreement.rows] == [["best", "DipSVD, reported"]]
    # best gives more to later layers, the paper's search less.
    assert agreement.rows[0].cells[-1].value < 0
    assert "official code of DipSVD" in agreement.note
    assert [_texts(row)[:3] for row in shares.rows][-1] == ["50 % (\u221250 %)", "DipSVD, reported", "39.5"]
    assert [row.cells[1].text for row in shares.rows] == ["best", "svd", "DipSVD, reported"]
    assert len(shares.columns) == 2 + 32

    presets = {"dipsvd_heuristic": "best", "dipsvd_bayesopt": "drank"}
    named = [
        replace(synthetic.record(like, 0.2, hub=vicuna, layers=32, group_size=1), name=name)
        for name, like in presets.items()
    ]
    (agreement,) = ranks.correlation_tables(_section(*named), "m1")
    assert [column.title for column in agreement.columns][-2:] == ["Pearson r", "reported"]
    assert agreement.rows[0].cells[-1].value == 0.687


def test_what_a_sweep_shares_is_what_its_first_point_paid_for_all() -> None:
    def point(removed: float, minute: int, **timings: float) -> RunRecord:
        started = f"2026-01-02T03:{minute:02d}:00+00:00"
        return replace(synthetic.record(removed=removed), timings=timings, started=started, finished=started)

    evaluation = {"perplexity (dense)": 99.0, "perplexity (compressed)": 99.0, "accuracy (compressed)": 99.0}
    first = point(0.4, 0, load=1.0, compress=5.0, calibrate=3.0, decompose=1.5, tokenise=0.5, **evaluation)
    later = [point(removed, i, compress=0.5, **evaluation) for i, removed in enumerate((0.2, 0.3), start=1)]
    section = _section(*later, first)
    (cost_of_series,) = cost.shared_costs(section.series[0])
    assert (cost_of_series.first_seconds, cost_of_series.all_seconds) == (pytest.approx(6.5), pytest.approx(7.5))
    (table,) = (t for t in cost.cost_tables(section, "m1") if t.key == "m1-shared")
    assert _texts(table.rows[0]) == ["svd_llm", "3", "6.5 s", "7.5 s", "1.15", "nothing"]
    # Points of different sweeps, and single ones, share nothing that the records show.
    other = replace(later[0], sweep={"id": "other", "job": 0, "settings": []})
    assert not cost.shared_costs(_section(first, other).series[0])
    assert not [t for t in cost.cost_tables(_section(first), "m1") if t.key == "m1-shared"]


def test_every_row_has_its_commit_configuration_and_environment() -> None:
    gpu = [{"name": "NVIDIA H100", "memory_bytes": 85_899_345_920}]
    other = synthetic.record(removed=0.4, hardware={"cpu": "Another", "gpus": gpu})
    study = arrange(_collection(synthetic.record(), other))
    places = runs.environments(study)
    assert [place.letter for place in places] == ["A", "B"]
    assert "NVIDIA H100 (80.00 GiB)" in places[1].hardware
    table = runs.all_runs(study, places)
    titles = [column.title for column in table.columns]
    values = dict(zip(titles, (cell.exact for cell in table.rows[1].cells), strict=True))
    assert values["environment"] == "B"
    assert values["commit"] == "0123456789abcdef0123456789abcdef01234567"
    assert values["configuration"] == other.config_hash


def test_csv_holds_exact_values_and_markdown_no_markup() -> None:
    name = "a|b <script>*x*\nnext"
    row = Row((Cell(name), Cell("7.94", value=7.936123456789, best=True)))
    table = Table("t", "Title", (Column("name", numeric=False), Column("ppl")), (row,), legend=("see <b>",))
    parsed = list(csv.reader(io.StringIO(to_csv(table))))
    assert parsed == [["name", "ppl"], [name, "7.936123456789"]]
    text = to_markdown([table], "Study")
    assert "| a\\|b &lt;script&gt;\\*x\\* next | **7.94** |" in text
    assert "1. see &lt;b&gt;" in text
    assert "<script>" not in text and "<b>" not in text


def test_line_ends_without_end_are_counted_and_not_shown() -> None:
    samples = {"prompt": "Returns", "dense": "\n\nthe result.\n\nTwice.\n", "compressed": "the" + " \n" * 60 + "end"}
    section = _section(synthetic.record("svd", 0.2, sample=samples))
    (table,) = (t for t in results.result_tables(section, "m1") if t.title == "What the models write")
    assert [row.cells[-1].text for row in table.rows] == ["the result.\n\nTwice.", "the\n(60 line ends)\nend"]
