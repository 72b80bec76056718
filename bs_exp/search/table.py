"""The end of a search on the screen: its best trials, what failed, and where everything lies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bs_exp.search.results import Point, Results

_PIPED_WIDTH = 80
_ROWS = 5
_FAILURES = 3


def print_results(results: Results, places: Sequence[tuple[str, Path | str]], console: Console | None = None) -> None:
    """Prints the front, or the best trials of one objective with the best first."""
    console = console or Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    with console.capture() as table:
        console.print(_table(results))
    # The title stands by itself: above a narrow table it would be wrapped.
    lines = [_title(results), *(line.rstrip() for line in table.get().splitlines())]
    lines += [
        f"failed   trial {p.number}: {shorten(str(p.error).splitlines()[0], 160)}" for p in results.failed[:_FAILURES]
    ]
    if len(results.failed) > _FAILURES:
        lines.append(f"failed   {len(results.failed) - _FAILURES} more, see trials.csv")
    # Paths and commands are copied from here: never wrapped, whatever the width.
    lines += [f"{title:<9}{place}" for title, place in places]
    if results.best:
        lines.append(f"again    {results.best[0].command}")
    console.file.write("\n".join(lines) + "\n")


def _title(results: Results) -> str:
    done, failed = len(results.completed), len(results.failed)
    what = "Pareto front" if results.is_front else "best trials"
    return f"{results.study}: {what} of {done} completed{f', {failed} failed' if failed else ''}"


def _table(results: Results) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("trial", justify="right", no_wrap=True)
    for name in results.objectives:
        table.add_column(escape(name), justify="right", no_wrap=True)
    table.add_column("parameters", overflow="fold")
    for point in _rows(results):
        params = " ".join(f"{key}={_number(value)}" for key, value in point.params.items())
        table.add_row(str(point.number), *(_number(value) for value in point.values), escape(params))
    return table


def _rows(results: Results) -> Sequence[Point]:
    if results.is_front:
        return results.best
    falling = results.directions[0] == "maximize"
    return sorted(results.completed, key=lambda point: point.values[0], reverse=falling)[:_ROWS]


def _number(value: object) -> str:
    match value:
        case float() if value.is_integer() or 1000 <= abs(value) < 1e15:
            return f"{value:,.0f}"
        case float():
            return f"{value:.4g}"
        case _:
            return str(value)
