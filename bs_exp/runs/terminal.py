"""The text at the end of a run, made from its record: metrics of the dense and the compressed model, cost, places."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any, TypeGuard

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bs_exp.printable import printable
from bs_exp.progress import WARNING
from bs_exp.records import metrics
from bs_exp.records.record import FILE_NAME, RunRecord
from bs_exp.types import RankPlan

_ABSENT = "-"
# Without a terminal the width is unknown; files and logs are read at 80 columns.
_PIPED_WIDTH = 80
# Stages that round to 0.0 s are left out.
_SHORT = 0.05
_WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
# Rates with their slowest and fastest repeat, device and lengths are in the record; people compare these.
_SPEEDS = (metrics.PREFILL, metrics.DECODE, metrics.PEAK_MEMORY)
_BREAK_EVEN = {"prefill": metrics.BREAK_EVEN[metrics.PREFILL], "decode": metrics.BREAK_EVEN[metrics.DECODE]}
_SIZES = (  # title, dense, compressed
    ("parameters", "dense_parameters", "parameters"),
    ("  in targeted matrices", "dense_targeted_parameters", "targeted_parameters"),
    ("bytes", "dense_bytes", "bytes"),
)


@dataclass(frozen=True)
class MetricRow:
    """A metric of both models; `error` is the standard error of each."""

    name: str
    dense: Any
    compressed: Any
    error: tuple[Any, Any] = (None, None)
    change: str | None = None  # what stands in place of the change from the one to the other

    @property
    def cells(self) -> tuple[str, str, str, str]:
        dense, compressed = (_value(v) + _error(e) for v, e in zip(self._values, self.error, strict=True))
        # A share of items changes by points: a relative change of an accuracy misleads.
        change = _points if metrics.is_accuracy(self.name) else _percent
        shown = change(self.dense, self.compressed) if self.change is None else self.change
        return escape(printable(self.name)), dense, compressed, shown

    @property
    def _values(self) -> tuple[Any, Any]:
        return self.dense, self.compressed


def print_report(record: RunRecord, folder: Path, console: Console | None = None) -> None:
    """Prints the table of metrics and sizes, then what was kept, what it cost, and the paths of record and model.

    How numbers came about (hashes of texts, counts of items, lengths, repeats) stands in the record alone.
    """
    console = console or Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    with console.capture() as table:
        console.print(_table(record))
    # Rich pads every line to the table's width; what is piped into a file should not end in blanks.
    lines = [line.rstrip() for line in table.get().splitlines()]
    for title, text in _facts(record):
        lines += wrap(
            printable(text), console.width, initial_indent=f"{title:<9}", subsequent_indent=" " * 9, **_WHOLE_WORDS
        )
    # Paths are copied from here: never wrapped, whatever the width.
    lines += [printable(f"{title:<9}{path}") for title, path in _places(record, folder)]
    console.file.write("\n".join(lines) + "\n")


def metric_rows(record: RunRecord) -> list[MetricRow]:
    """What models are compared by: quality, standard errors beside it, what could not be evaluated, and speeds."""
    dense, compressed = record.metrics.get("dense", {}), record.metrics.get("compressed", {})
    lost = (name for name in dict.fromkeys([*dense, *compressed]) if metrics.is_nonfinite(name))
    names = [*metrics.quality((dense, compressed)), *(name for name in lost if dense.get(name) or compressed.get(name))]
    names += [name for name in _SPEEDS if name in dense or name in compressed]
    names += [name for name in compressed if metrics.kind_of(name) in (metrics.DRAFT_SPEEDUP, metrics.DRAFT_BOUND)]
    return [
        MetricRow(
            name,
            dense.get(name),
            compressed.get(name),
            (metrics.standard_error(dense, name), metrics.standard_error(compressed, name)),
            _speed_change(compressed, name) if name in metrics.BREAK_EVEN else None,
        )
        for name in names
    ]


def _speed_change(compressed: Mapping[str, Any], rate: str) -> str:
    """The change of a rate as it was measured in turns; two medians beside each other say nothing of it."""
    speedup = metrics.measured_speedup(compressed, rate)
    return metrics.NO_DIFFERENCE if speedup is None else f"{speedup - 1:+.1%}"


def _facts(record: RunRecord) -> Iterator[tuple[str, str]]:
    for note in record.notes:
        if note.startswith(WARNING):
            yield "WARNING", note.removeprefix(WARNING)
    if (plan := record.rank_plan) is not None:
        yield "kept", _kept(plan, record.size.get("model_retain_ratio"))
    if cost := _cost(record.metrics.get("compressed", {})):
        yield "cost", cost
    if long := {name: value for name, value in record.timings.items() if value >= _SHORT}:
        yield "time", ", ".join(f"{name} {_seconds(value)}" for name, value in long.items())
    if hits := record.cache.get("hits"):
        yield "cache", ", ".join(f"{count} {kind}{'s' * (count > 1)} reused" for kind, count in hits.items())


def _table(record: RunRecord) -> Table:
    title = escape(printable(f"{record.name}: {record.status}"))
    table = Table(
        box=SIMPLE_HEAD, title=title, title_style="bold", title_justify="left", pad_edge=False, collapse_padding=True
    )
    table.add_column("", overflow="fold")
    for column in ("dense", "compressed", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in metric_rows(record):
        table.add_row(*row.cells)
    table.add_section()
    for name, dense, compressed in _SIZES:
        if compressed in record.size:
            table.add_row(*MetricRow(name, record.size.get(dense), record.size[compressed]).cells)
    return table


def _kept(plan: RankPlan, whole: float | None) -> str:
    """What the plan keeps of its matrices, and `whole`, the share kept of the model's parameters."""
    shared = sum(planned.group.size > 1 and planned.rank is not None for planned in plan.groups)
    return (
        f"{plan.retain_ratio:.1%} of the targeted parameters (asked: {plan.requested_ratio:.1%})"
        + (f", {whole:.1%} of the model" if whole is not None else "")
        + f"; {len(plan.groups)} {'group' if len(plan.groups) == 1 else 'groups'}, {shared} with a shared basis"
    )


def _cost(found: Mapping[str, Any]) -> str:
    """Seconds of the compression, and after how many tokens it has paid for itself; empty if they were not measured."""
    seconds = found.get(metrics.COMPRESSION_SECONDS)
    if not _finite(seconds):
        return ""
    tokens = {phase: found.get(name) for phase, name in _BREAK_EVEN.items()}
    paid = [f"{value:,.0f} tokens of {phase}" for phase, value in tokens.items() if _finite(value)]
    never = [phase for phase, value in tokens.items() if value is not None and not _finite(value)]
    words = [f"compressed in {_seconds(seconds)}"]
    words += [f"paid for after {' or '.join(paid)}"] if paid else []
    words += [f"no gain of speed in {' and '.join(never)}"] if never else []
    return "; ".join(words)


def _places(record: RunRecord, folder: Path) -> Iterator[tuple[str, Path]]:
    yield "record", folder / FILE_NAME
    if record.model_folder is not None:
        yield "model", folder / record.model_folder


def _value(value: Any) -> str:
    match value:
        case None:
            return _ABSENT
        case str():
            return value if len(value) <= 16 else f"{value[:12]}…"
        case int():
            return f"{value:,}"
        case float() if math.isfinite(value) and abs(value) >= 1000:
            return f"{value:,.0f}"
        case _:
            return f"{value:.4g}"


def _error(value: Any) -> str:
    return f" ± {value:.2g}" if isinstance(value, float) else ""


def _percent(dense: Any, compressed: Any) -> str:
    """Relative change; empty where a ratio says nothing."""
    return f"{compressed / dense - 1:+.1%}" if _finite(dense) and _finite(compressed) and dense != 0 else ""


def _points(dense: Any, compressed: Any) -> str:
    return f"{100 * (compressed - dense):+.1f} pt" if _finite(dense) and _finite(compressed) else ""


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"
