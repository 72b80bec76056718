"""Every record is found once; what cannot be read is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bs_exp.errors import RecordError
from bs_exp.records.pairs import PAIRS_FILE
from bs_exp.records.record import FILE_NAME, FORMAT_VERSION, write_record
from bs_exp.records.sweep import SweepPlan, SweepPoint
from bs_exp.reporting.collect import collect
from tests.support import synthetic


def test_records_are_found_at_any_depth_in_the_order_of_their_jobs(tmp_path: Path) -> None:
    for job, depth in ((2, "a"), (0, "b/c/d"), (1, "e")):
        write_record(synthetic.record(sweep={"id": "s", "job": job}), tmp_path / depth)
    found = collect([tmp_path]).found
    assert [item.record.sweep["job"] for item in found if item.record.sweep] == [0, 1, 2]
    assert [item.folder.name for item in found] == ["d", "e", "a"]


def test_a_record_counts_once_though_it_is_reached_twice(tmp_path: Path) -> None:
    synthetic.write([synthetic.record()], tmp_path / "runs")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "link").symlink_to(tmp_path / "runs", target_is_directory=True)
    (tmp_path / "runs" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert len(collect([tmp_path, tmp_path / "runs"]).found) == 1
    assert len(collect([tmp_path / "sweep"]).found) == 1


def _damage(data: dict[str, Any], key: str, value: Any) -> str:
    return json.dumps({**data, key: value})


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("format_version", FORMAT_VERSION + 1, f"format_version is {FORMAT_VERSION + 1}"),
        ("surprise", 1, "unknown fields surprise"),
        ("metrics", [], "metrics is no JSON object"),
        ("metrics", {"dense": 3}, "metrics.dense is no JSON object"),
        ("timings", {"load": "long"}, "timings.load is no number"),
        ("config", None, "config is no JSON object"),
        ("plan", {"groups": [{"matrix": "q"}]}, "plan.requested_ratio is missing"),
        ("started", None, "started is no time"),
        ("config_hash", 7, "config_hash is no text"),
        ("status", "odd", "not a run record"),
    ],
)
def test_a_damaged_record_is_skipped_by_name(tmp_path: Path, key: str, value: Any, reason: str) -> None:
    synthetic.write([synthetic.record()], tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / FILE_NAME).write_text(_damage(synthetic.record().to_dict(), key, value))
    collection = collect([tmp_path])
    assert len(collection.found) == 1
    (skipped,) = collection.skipped
    assert skipped.path == tmp_path / "bad" / FILE_NAME
    assert reason in skipped.reason


def test_half_a_record_is_skipped_by_name(tmp_path: Path) -> None:
    synthetic.write([synthetic.record()], tmp_path)
    whole = (tmp_path / "000" / FILE_NAME).read_text()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / FILE_NAME).write_text(whole[: len(whole) // 2])
    (skipped,) = collect([tmp_path]).skipped
    assert "half-written" in skipped.reason


def test_nothing_to_read_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"There is no record\.json below"):
        collect([tmp_path])
    with pytest.raises(RecordError, match="is no folder"):
        collect([tmp_path / "absent"])
    (tmp_path / FILE_NAME).write_text("{")
    with pytest.raises(RecordError, match=r"(?s)None of the records .* half-written"):
        collect([tmp_path])


def test_points_that_a_sweep_has_not_started_are_known(tmp_path: Path) -> None:
    write_record(synthetic.record(), tmp_path / "done")
    names = {"done": "0.8", "later": "0.5"}
    points = tuple(SweepPoint(name, ("seed=1", f"retain_ratio={ratio}")) for name, ratio in names.items())
    SweepPlan("s", ("python",), "2026-01-01T00:00:00+00:00", points).write(tmp_path)
    (waiting,) = collect([tmp_path]).waiting
    assert waiting.settings == "retain_ratio=0.5"


def test_tables_of_pairs_are_read(tmp_path: Path) -> None:
    synthetic.write([synthetic.record()], tmp_path)
    pairs = [{"layers": [0, 3], "ratio": 0.75}, {"layers": [1, 3], "ratio": None}]
    tables = [{"matrix": "q", "layers": [0, 3], "values": [[None, -1.5], [-1.5, None]], "pairs": pairs}]
    (tmp_path / PAIRS_FILE).write_text(json.dumps({"unit": "nats", "tables": tables}))
    (table,) = collect([tmp_path]).pairs
    assert (table.matrix, table.layers, table.unit) == ("q", (0, 3), "nats")
    assert table.values == ((None, -1.5), (-1.5, None))
    assert table.ratios == {(0, 3): 0.75}


@pytest.mark.parametrize("text", ["[]", "{", '{"tables": [{"matrix": "q", "layers": [0, 1], "values": [[1]]}]}'])
def test_a_damaged_table_of_pairs_is_skipped_by_name(tmp_path: Path, text: str) -> None:
    synthetic.write([synthetic.record()], tmp_path)
    (tmp_path / PAIRS_FILE).write_text(text)
    collection = collect([tmp_path])
    assert not collection.pairs
    assert [item.path.name for item in collection.skipped] == [PAIRS_FILE]


def test_records_of_failed_and_killed_runs_are_found(tmp_path: Path) -> None:
    killed = replace(synthetic.record(), metrics={}, plan=None, timings={})
    write_record(killed, tmp_path)
    assert len(collect([tmp_path]).found) == 1
