"""A table as data, and as CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bs_exp.printable import spreadsheet_cell
from bs_exp.records.comparison import equal_sizes
from bs_exp.reporting import formats


@dataclass(frozen=True)
class Cell:
    """The shown text, and the exact value. `link` is the number of a run."""

    text: str
    value: Any = None
    best: bool = False
    hint: str = ""
    style: str = ""  # a class of the page: muted, bad, good, text
    link: int | None = None

    @property
    def exact(self) -> Any:
        return self.text if self.value is None else self.value


@dataclass(frozen=True)
class Column:
    """A heading; numbers stand on the right."""

    title: str
    numeric: bool = True
    hint: str = ""
    key: str = ""  # in CSV files, where it is another word


@dataclass(frozen=True)
class Row:
    """Cells from left to right. `kind` is a class of the page: dense, reported, block (the first row of one)."""

    cells: tuple[Cell, ...]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """`key` is the name of its files."""

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""
    sortable: bool = False
    legend: tuple[str, ...] = ()  # what numbers in the cells stand for, from 1 on


def text(value: str, **more: Any) -> Cell:
    return Cell(value, **more)


def mark_best(cells: list[Cell], kept: Sequence[float | None], *, lowest: bool) -> list[Cell]:
    """The cells with the best marked among those that kept the same, ties as they are printed included.

    `kept` is the share of its parameters that the model of each cell kept. A result without equals is not marked.
    """
    marked = list(cells)
    numbers = [share if formats.is_number(cell.value) else None for cell, share in zip(cells, kept, strict=True)]
    for group in equal_sizes(numbers):
        if len(group) > 1:
            best = (min if lowest else max)(cells[i].value for i in group)
            shown = {cells[i].text for i in group if cells[i].value == best}
            for i in group:
                marked[i] = replace(cells[i], best=cells[i].text in shown)
    return marked


def to_csv(table: Table) -> str:
    """The table as CSV, with exact values; texts that a spreadsheet would take for formulas are marked as texts."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([spreadsheet_cell(column.key or column.title) for column in table.columns])
    writer.writerows([spreadsheet_cell(cell.exact) for cell in row.cells] for row in table.rows)
    return file.getvalue()


def to_markdown(tables: Iterable[Table], title: str) -> str:
    """All tables, one heading each; the best per column bold."""
    parts = [f"# {_plain(title)}"]
    for table in tables:
        lines = [f"## {_plain(table.title)}", ""]
        if table.note:
            lines += [_plain(table.note), ""]
        lines.append(_line(_plain(column.title) or " " for column in table.columns))
        lines.append(_line("---:" if column.numeric else ":---" for column in table.columns))
        lines += [_line(_markdown(cell) for cell in row.cells) for row in table.rows]
        if table.legend:
            lines += ["", *(f"{i}. {_plain(words)}" for i, words in enumerate(table.legend, start=1))]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown(cell: Cell) -> str:
    shown = _plain(cell.text)
    return f"**{shown}**" if cell.best else shown


def _plain(words: str) -> str:
    """One line in which nothing is markup: HTML inside Markdown would be run by what shows it."""
    escaped = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for sign in ("\\", "|", "*", "_", "`", "[", "]"):
        escaped = escaped.replace(sign, f"\\{sign}")
    return " ".join(escaped.split())
