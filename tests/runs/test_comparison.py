"""`bs-exp demo`: methods at one budget beside the dense model, by the real command line, and points that fail."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bs_exp.records.record import read_record

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # a narrow table folds names


def _rows(out: str) -> dict[str, list[str]]:
    """The cells of the table by method."""
    lines = [line for line in out.splitlines() if re.match(r" \w", line)]
    return {cells[0]: cells[1:] for cells in (re.split(r"\s{2,}", line.strip()) for line in lines[1:])}


def test_the_demo_compares_methods_and_says_what_to_type_next(cli: Cli, tiny: tuple[str, ...], tmp_path: Path) -> None:
    settings = (*tiny, "experiment=svd,basis_sharing", "retain_ratio=0.5")
    done = cli("demo", *settings, "hydra.sweep.dir=sweep")
    assert done.status == 0, done.err
    records = {record.name: record for record in map(read_record, (tmp_path / "sweep").glob("*/"))}
    assert records.keys() == {"svd", "basis_sharing"}
    # Measured once.
    assert len({record.provenance["model"]["loaded_by"] for record in records.values()}) == 1
    rows = _rows(done.out)
    assert list(rows) == ["dense", "svd", "basis_sharing"]
    dense = records["svd"].metrics["dense"]["ppl/text"]
    assert rows["dense"][:2] == ["100.0 %", f"{dense:.1f}"]
    for name, record in records.items():
        kept, perplexity, times, _, of_dense = rows[name]
        found = record.metrics["compressed"]["ppl/text"]
        assert perplexity == f"{found:.1f}" and times == f"{found / dense:.2f}"
        assert kept == f"{100 * record.size['retain_ratio']:.1f} %" and float(kept.split()[0]) <= 50.0
        assert of_dense == f"{100 * record.size['bytes'] / record.size['dense_bytes']:.1f} %"
    assert "W_i ~ B C_i" in done.out and "bs-exp demo retain_ratio=0.6" in done.out
    assert f"bs-exp report {Path('sweep')}" in done.out
    again = cli("demo", *settings, "hydra.sweep.dir=sweep")
    assert "2 of them finished before" in again.err and _rows(again.out) == rows


def test_a_method_that_fails_is_a_row_and_a_message(cli: Cli, tiny: tuple[str, ...]) -> None:
    done = cli("demo", *tiny, "experiment=basis_sharing", "sharing.group_size=2,9", "hydra.sweep.dir=sweep")
    assert done.status == 1
    rows = _rows(done.out)
    assert rows["sharing.group_size=9"] == ["failed"] and len(rows["sharing.group_size=2"]) == 5
    assert re.search(r"^failed   \S+: .*group_size", done.out, re.MULTILINE)
    assert "resume   the same command again" in done.out
