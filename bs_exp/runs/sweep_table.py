"""The text at the end of a sweep, made from its records: the outcome of every point, the best one, what to do next."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bs_exp.printable import printable, shortened
from bs_exp.records.comparison import equal_sizes
from bs_exp.records.metrics import lower_is_better
from bs_exp.records.record import RunRecord
from bs_exp.records.sweep import PointOutcome, PointState, duration, objectives, seconds, varying

FINISHED = (PointOutcome.COMPLETED, PointOutcome.KEPT)
_PIPED_WIDTH = 100
_LONGEST_MESSAGE = 500
# Of a sweep over many ratios: the largest models first.
_MOST_BEST = 6


def print_sweep(name: str, folder: Path, states: list[PointState], console: Console | None = None) -> None:
    """Prints one row per point, errors, the best point, the count by outcome, and where the records lie."""
    console = console or Console(highlight=False)
    counts = Counter(state.outcome for state in states)
    lines = [
        *table_lines(_table(name, states), console),
        *(printable(f"best     {line}") for line in _best(states)),
        f"points   {len(states)}: " + ", ".join(f"{counts[o]} {o}" for o in PointOutcome if counts[o]),
        *problems(states),
        printable(f"records  {folder}"),
        printable(f"report   bs-exp report {folder}"),
    ]
    console.file.write("\n".join(lines) + "\n")


def table_lines(table: Table, console: Console) -> list[str]:
    """The lines of a table, without the blanks to its width at their ends; a pipe's width is set."""
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


def problems(states: list[PointState]) -> Iterator[str]:
    """The error of each failed point, and how to go on if any point is not finished."""
    for state in states:
        if state.outcome is PointOutcome.FAILED and state.record and state.record.error:
            message = str(state.record.error["message"]).splitlines()[0]
            yield printable(f"failed   {state.point.folder}: {shortened(message, _LONGEST_MESSAGE)}")
    if any(state.outcome not in FINISHED for state in states):
        yield "resume   the same command again runs what is not completed, and nothing else"


def _best(states: list[PointState]) -> Iterator[str]:
    """For each objective, the best of every two points or more that kept the same share of their parameters."""
    labels = varying([state.point.settings for state in states])
    values: dict[str, list[tuple[float, float | None, str]]] = {}
    for state, label in zip(states, labels, strict=True):
        if state.record is not None and state.outcome in FINISHED:
            for name, value in objectives(state.record).items():
                if math.isfinite(value):
                    found = values.setdefault(name, [])
                    found.append((value, _kept(state.record), label or state.point.folder))
    for name, found in values.items():
        groups = [group for group in equal_sizes([kept for _, kept, _ in found]) if len(group) > 1]
        for group in reversed(groups[-_MOST_BEST:]):
            best = (min if lower_is_better(name) else max)(group, key=lambda i: found[i][0])
            value, kept, label = found[best]
            yield f"{name} {value:.5g} with {kept:.1%} kept: {label}"


def _kept(record: RunRecord) -> float | None:
    value = record.size.get("retain_ratio")
    return value if isinstance(value, int | float) else None


def _table(name: str, states: list[PointState]) -> Table:
    table = Table(box=SIMPLE_HEAD, title=printable(name), title_style="bold", title_justify="left", pad_edge=False)
    names = dict.fromkeys(name for state in states if state.record for name in objectives(state.record))
    table.add_column("point", overflow="fold")
    table.add_column("outcome", no_wrap=True)
    for name in names:
        table.add_column(escape(printable(name)), justify="right", no_wrap=True)
    table.add_column("kept", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("folder", overflow="fold")
    for state, label in zip(states, varying([s.point.settings for s in states]), strict=True):
        done = state.record if state.outcome in FINISHED else None
        table.add_row(
            Text(printable(label)),  # settings hold brackets, which are no markup
            str(state.outcome),
            *(_number(done, name) for name in names),
            "" if done is None or (kept := _kept(done)) is None else f"{kept:.1%}",
            duration(seconds(done)) if done else "",
            state.point.folder,
        )
    return table


def _number(record: RunRecord | None, name: str) -> str:
    found = objectives(record) if record else {}
    return f"{found[name]:.5g}" if name in found else ""
