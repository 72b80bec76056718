"""Prints the end of a search: its best trials, what failed, and where everything lies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bs_exp.printable import printable
from bs_exp.search.results import Results

_PIPED_WIDTH = 80
_ROWS = 5
_FAILURES = 3


def print_results(results: Results, places: Sequence[tuple[str, Path | str]]) -> None:
    """Prints the front, or the best five trials of one objective with the best first, on stdout."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    with console.capture() as table:
        console.print(_table(results))
    done, failed = len(results.completed), results.failed
    what = "Pareto front" if results.is_front else "best trials"
    # The title stands by itself: above a narrow table it would be wrapped.
    lines = [f"{printable(results.study)}: {what} of {done} completed{f', {len(failed)} failed' if failed else ''}"]
    lines += [line.rstrip() for line in table.get().splitlines()]
    lines += [
        printable(f"failed   trial {p.number}: {shorten(str(p.error).splitlines()[0], 160)}")
        for p in failed[:_FAILURES]
    ]
    if len(failed) > _FAILURES:
        lines.append(f"failed   {len(failed) - _FAILURES} more, see trials.csv")
    # Paths and commands are copied from here: never wrapped, whatever the width.
    lines += [printable(f"{title:<9}{place}") for title, place in places]
    if results.best:
        lines.append(printable(f"again    {results.best[0].command}"))
    console.file.write("\n".join(lines) + "\n")


def _table(results: Results) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("trial", justify="right", no_wrap=True)
    for name in results.objectives:
        table.add_column(escape(printable(name)), justify="right", no_wrap=True)
    table.add_column("parameters", overflow="fold")
    falling = results.directions[0] == "maximize"
    best = sorted(results.completed, key=lambda point: point.values[0], reverse=falling)[:_ROWS]
    for point in results.best if results.is_front else best:
        params = " ".join(f"{key}={_number(value)}" for key, value in point.params.items())
        table.add_row(str(point.number), *map(_number, point.values), escape(printable(params)))
    return table


def _number(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value.is_integer() or 1000 <= abs(value) < 1e15 else f"{value:.4g}"
