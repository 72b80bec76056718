"""The text at the end of a sweep that compares methods on one model: what each kept, how well, and how large it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bs_exp.printable import printable
from bs_exp.records.metrics import title
from bs_exp.records.record import RunRecord
from bs_exp.records.sweep import PointState, objectives, varying
from bs_exp.reporting import formats
from bs_exp.runs.sweep_table import FINISHED, problems, table_lines

_METHOD = "experiment="


def print_comparison(
    name: str, folder: Path, states: list[PointState], closing: str, console: Console | None = None
) -> None:
    """Prints the dense model and a row per point, then what failed, where records and report are, and `closing`.

    Each objective of the points has a column, and beside it the multiple of the dense model's value.
    """
    console = console or Console(highlight=False)
    lines = [
        *table_lines(_table(name, states), console),
        *problems(states),
        printable(f"records  {folder}"),
        printable(f"report   bs-exp report {folder}"),
    ]
    if closing:
        lines += ["", *closing.rstrip().splitlines()]
    console.file.write("\n".join(lines) + "\n")


def _table(name: str, states: list[PointState]) -> Table:
    records = [state.record for state in states if state.record is not None and state.outcome in FINISHED]
    names = list(dict.fromkeys(metric for record in records for metric in objectives(record)))
    table = Table(box=SIMPLE_HEAD, title=escape(printable(name)), title_style="bold", title_justify="left")
    table.pad_edge = False
    table.add_column("method", overflow="fold")
    table.add_column("kept", justify="right", no_wrap=True)
    for metric in names:
        table.add_column(Text(printable(title(metric))), justify="right", no_wrap=True)
        table.add_column("x dense", justify="right", no_wrap=True)
    table.add_column("model", justify="right", no_wrap=True)
    table.add_column("of dense", justify="right", no_wrap=True)
    if (dense := _dense_cells(records, names)) is not None:
        table.add_row("dense", *dense)
    labels = varying([state.point.settings for state in states])
    for state, label in zip(states, labels, strict=True):
        method = Text(printable(label.removeprefix(_METHOD)))  # settings hold brackets, which are no markup
        if state.record is None or state.outcome not in FINISHED:
            table.add_row(method, str(state.outcome))
        else:
            table.add_row(method, *_cells(state.record, names))
    return table


def _dense_cells(records: list[RunRecord], names: list[str]) -> list[str] | None:
    """None where the points were not compared with the same values."""
    found = {(r.size.get("dense_bytes"), *(r.metrics.get("dense", {}).get(name) for name in names)) for r in records}
    if len(found) != 1:
        return None
    size, *values = found.pop()
    cells = [(formats.metric(name, value), "") for name, value in zip(names, values, strict=True)]
    return ["100.0 %", *(cell for pair in cells for cell in pair), formats.size(size)]


def _cells(record: RunRecord, names: list[str]) -> list[str]:
    dense, own, size = record.metrics.get("dense", {}), objectives(record), record.size
    pairs = [(formats.metric(n, own.get(n)), _ratio(own.get(n), dense.get(n), "{:.2f}")) for n in names]
    return [
        _ratio(size.get("targeted_parameters"), size.get("dense_targeted_parameters"), "{:.1%}").replace("%", " %"),
        *(cell for pair in pairs for cell in pair),
        formats.size(size.get("bytes")),
        _ratio(size.get("bytes"), size.get("dense_bytes"), "{:.1%}").replace("%", " %"),
    ]


def _ratio(value: Any, base: Any, form: str) -> str:
    """Empty where one of them is no number."""
    return form.format(value / base) if formats.is_number(value) and formats.is_number(base) and base else ""
