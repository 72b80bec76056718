"""Texts of others: safe in a terminal, in an SVG file and in a spreadsheet, and otherwise as they were."""

from __future__ import annotations

import csv
import io
from typing import Any
from xml.dom import minidom

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_exp.printable import printable, printable_data, printable_lines, shortened, spreadsheet_cell


@pytest.mark.parametrize(
    "text", ["plain", "Größe 3 µm", "日本語", "नमस्ते", "a\u200db", "\U0001f469\u200d\U0001f680", "$x_1$ [b] <c>"]
)
def test_what_can_be_shown_stays(text: str) -> None:
    assert printable(text) == printable_lines(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("a\x00\x07\x9b1m", "a\\x00\\x07\\x9b1m"),
        ("one\ntwo\tthree\r", "one\\ntwo\\tthree\\r"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\ud800\ufffe", "\\ud800\\ufffe"),
    ],
)
def test_what_controls_a_terminal_is_spelled_out(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable_lines("a\nb\tc") == "a\nb\tc"


@given(st.text())
def test_printable_lines_can_stand_in_xml(text: str) -> None:
    shown = printable_lines(text)
    escaped = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert minidom.parseString(f"<t>{escaped}</t>".encode()).documentElement is not None
    assert printable_lines(shown) == shown


def test_data_keeps_its_shape_and_its_numbers() -> None:
    data = {"a\x1b": ("x" * 30, 1.5, None, True), "b": [{"c": "\x07"}]}
    found = printable_data(data, longest=12)
    assert found["b"] == [{"c": "\\x07"}]
    text, *numbers = found["a\\x1b"]
    assert numbers == [1.5, None, True] and "(18 characters)" in text


def test_a_long_text_keeps_its_two_ends() -> None:
    assert shortened("x" * 10, 10) == "x" * 10
    assert shortened("a" * 9 + "b" * 9_000_000 + "c" * 3, 12) == f"{'a' * 9} ... (9,000,000 characters) ... ccc"


@pytest.mark.parametrize(
    "text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1+1", "--1"]
)
def test_formulas_are_texts(text: str) -> None:
    assert spreadsheet_cell(text) == f"'{text}"


@pytest.mark.parametrize(
    "cell", [-1.5, 3, None, True, "-", "+12.5 %", "-0.3", "-1e-5", "svd", "a=b", "", float("-inf")]
)
def test_numbers_and_other_texts_are_left_alone(cell: Any) -> None:
    assert spreadsheet_cell(cell) is cell


@given(st.one_of(st.text(), st.floats(allow_nan=False), st.integers()))
def test_no_cell_of_a_file_begins_a_formula(cell: Any) -> None:
    file = io.StringIO()
    csv.writer(file).writerow([spreadsheet_cell(cell)])
    (row,) = csv.reader(io.StringIO(file.getvalue(), newline="")) if file.getvalue().strip("\r\n") else [[""]]
    if isinstance(cell, str) and row and row[0].startswith(("=", "@", "\t", "\r")):
        pytest.fail(f"{row[0]!r} would be run")
    if isinstance(cell, int | float):
        assert type(cell)(row[0]) == cell
