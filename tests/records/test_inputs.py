"""Which files and whose code a result came from, and what of it has changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bs_exp.records import inputs
from bs_exp.records.inputs import changed_inputs, earlier_code, file_stamps
from bs_exp.records.record import FILE_NAME, RunRecord, Status, write_record
from tests.support.synthetic import record


@pytest.fixture(autouse=True)
def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_stamps", {})


def _anew(settings: Any) -> Mapping[str, str]:
    """The stamps that another process makes."""
    inputs._stamps.clear()
    return file_stamps(settings)


def test_files_and_checkpoint_folders_are_told_by_their_content(tmp_path: Path) -> None:
    text, model = tmp_path / "a.txt", tmp_path / "m"
    text.write_text("one", encoding="utf-8")
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf-8")
    (model / "model.safetensors").write_bytes(b"weights")
    settings = {
        "model": {"path": str(model), "name": str(text)},
        "calibration": {"corpus": {"files": [str(text)]}},
        "evaluation": [{"files": str(text), "path": "no/such/data_set"}],
    }
    first = _anew(settings)
    assert first.keys() == {str(text), str(model)}
    assert _anew(settings) == first
    (model / "notes.log").write_text("nothing that is loaded", encoding="utf-8")
    assert _anew(settings) == first
    (model / "model.safetensors").write_bytes(b"Weights")
    second = _anew(settings)
    assert second[str(text)] == first[str(text)] and second[str(model)] != first[str(model)]
    text.rename(tmp_path / "b.txt")
    (tmp_path / "a.txt").write_text("two", encoding="utf-8")
    assert _anew(settings)[str(text)] != first[str(text)]


def test_a_process_has_read_what_was_there_first(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one", encoding="utf-8")
    first = file_stamps({"files": [str(text)]})
    text.write_text("two", encoding="utf-8")
    assert file_stamps({"files": [str(text)]}) == first


def test_large_files_are_told_without_reading_them_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_LARGE", 8)
    monkeypatch.setattr(inputs, "_FIRST", 4)
    file = tmp_path / "m.safetensors"
    file.write_bytes(b"0123456789")
    first = _anew({"path": str(file)})
    assert _anew({"path": str(file)}) == first
    for content in (b"1123456789", b"01234567890"):
        file.write_bytes(content)
        assert _anew({"path": str(file)}) != first


def test_only_what_is_known_to_differ_has_changed() -> None:
    before = replace(record(), provenance={"files": {"a": "1", "b": "2"}})
    assert changed_inputs(before, {"a": "1", "b": "3", "c": "4"}) == ["b"]
    for unknown in ({}, {"files": ["a"]}, {"files": None}):
        assert changed_inputs(replace(before, provenance=unknown), {"a": "1"}) == []


def _point(folder: Path, code: str | None, **changes: Any) -> RunRecord:
    provenance = {} if code is None else {"code": {"mine.Mine": {"mine": code}}}
    made = replace(record(), provenance=provenance, **changes)
    write_record(made, folder)
    return made


def test_a_point_of_other_code_is_found_by_its_settings(tmp_path: Path) -> None:
    now = _point(tmp_path / "now", "new")
    settings = now.config
    assert earlier_code(now, tmp_path) is None
    _point(tmp_path / "failed", "old", status=Status.FAILED)
    _point(tmp_path / "other", "old", config={**settings, "retain_ratio": 0.1})
    _point(tmp_path / "without", None)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / FILE_NAME).write_text("{", encoding="utf-8")
    assert earlier_code(now, tmp_path) is None
    _point(tmp_path / "then", "old")
    assert earlier_code(now, tmp_path) == ("then", ["mine.Mine"])
    assert earlier_code(_point(tmp_path / "ours", None), tmp_path) is None
