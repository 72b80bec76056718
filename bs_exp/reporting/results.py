"""Tables of quality in the papers' layout: methods by ratio, and all metrics by ratio and method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bs_exp.records import metrics
from bs_exp.records.record import Status
from bs_exp.reporting import formats
from bs_exp.reporting.study import ReportedRun, Section, Series
from bs_exp.reporting.table import Cell, Column, Row, Table, mark_best, text

# A search tries another ratio in every trial: as columns they would be a table of holes.
_MOST_RATIOS = 12
# Metrics with a table and a curve of their own; all are in the table of everything.
MOST_HEADLINES = 24
_STATUS = {Status.FAILED: "failed", Status.INTERRUPTED: "stopped", Status.RUNNING: "unfinished"}


def result_tables(section: Section, key: str) -> Iterator[Table]:
    """Methods by ratio for every perplexity and the mean accuracy, then everything that was measured."""
    if not section.quality:
        return
    if len(section.ratios) <= _MOST_RATIOS:
        for name in metrics.headlines(section.quality, section.main_metric)[:MOST_HEADLINES]:
            yield _by_ratio(section, name, f"{key}-{formats.file_key(name)}")
    yield _everything(section, f"{key}-all")


def removed_title(removed: float) -> str:
    return formats.share(removed)


def series_columns(section: Section) -> list[Column]:
    """The method, and what else tells series apart."""
    return [Column("method", numeric=False), *(Column(name, numeric=False) for name in section.dials)]


def series_cells(series: Series) -> list[Cell]:
    return [text(series.method), *(text(value) for value in series.values)]


def measured(point: ReportedRun | None, name: str) -> Cell:
    """A metric of a compressed model; where there is none, why."""
    if point is None:
        return Cell(formats.ABSENT, style="muted", hint="not in these records")
    value = point.compressed.get(name)
    if value is not None and point.completed:
        return Cell(formats.metric(name, value), value=value, hint=_hint(point, name), link=point.number)
    if point.completed:
        return Cell(formats.ABSENT, style="muted", hint="not measured", link=point.number)
    style = "bad" if point.record.status is Status.FAILED else "muted"
    return Cell(_STATUS[point.record.status], style=style, hint=_why(point), link=point.number)


def _hint(point: ReportedRun, name: str) -> str:
    words = [f"dense {formats.metric(name, point.dense[name])}"] if name in point.dense else []
    if difference := formats.change(point.compressed.get(name), point.dense.get(name)):
        words.append(difference)
    if formats.is_number(error := metrics.standard_error(point.compressed, name)):
        words.append(f"standard error {error:.2g}")
    return ", ".join(words)


def _why(point: ReportedRun) -> str:
    return str((point.record.error or {}).get("message", "the process ended before the run did"))


def _by_ratio(section: Section, name: str, key: str) -> Table:
    columns = [*series_columns(section)]
    columns += [Column(removed_title(removed), hint=f"retain ratio {1 - removed:.4g}") for removed in section.ratios]
    cells = {
        removed: _marked(section, [measured(series.by_removed.get(removed), name) for series in section.series], name)
        for removed in section.ratios
    }
    dense = section.dense.get(name)
    rows = [_dense_row(section, [dense] * len(section.ratios), [name] * len(section.ratios))]
    for i, series in enumerate(section.series):
        rows.append(Row((*series_cells(series), *(cells[removed][i] for removed in section.ratios))))
    arrow = "lower is better" if metrics.lower_is_better(name) else "higher is better"
    return Table(
        key,
        f"{formats.sentence(metrics.title(name))} by share removed",
        tuple(columns),
        tuple(rows),
        note=f"Columns: share of the targeted parameters removed. {arrow.capitalize()}; {_best_words(section)}.",
    )


def _marked(section: Section, cells: list[Cell], name: str) -> list[Cell]:
    return cells if section.mixed else mark_best(cells, lowest=metrics.lower_is_better(name))


def _best_words(section: Section) -> str:
    if section.mixed:
        return "NOT COMPARABLE between rows that were made from other texts or code, so none is the best"
    return "the best of a column is bold"


def _dense_row(section: Section, values: Sequence[Any], names: Sequence[str], before: int = 0) -> Row:
    blank = [text("") for _ in section.dials]
    shown = (Cell(formats.metric(name, value), value=value) for name, value in zip(names, values, strict=True))
    return Row((*(text("") for _ in range(before)), text("dense"), *blank, *shown), kind="dense")


def _everything(section: Section, key: str) -> Table:
    names = section.quality
    columns = [Column("removed", hint="asked for"), *series_columns(section)]
    columns += [Column(metrics.short_title(name), hint=metrics.title(name)) for name in names]
    columns += [Column("kept", hint="share of the targeted parameters that is kept"), Column("size")]
    dense_bytes = next((p.record.size["dense_bytes"] for p in section.points if "dense_bytes" in p.record.size), None)
    dense = _dense_row(section, [section.dense.get(name) for name in names], names, before=1)
    end = (Cell("100.00 %", value=1.0), Cell(formats.size(dense_bytes), value=dense_bytes))
    rows = [Row((*dense.cells, *end), kind="dense")]
    for removed in section.ratios:
        rows += _block(section, removed, [(s, p) for s in section.series if (p := s.by_removed.get(removed))], names)
    return Table(
        key,
        "Everything measured, by ratio and method",
        tuple(columns),
        tuple(rows),
        note=f"Within a ratio {_best_words(section)}; differences below a standard error (shown on hovering) "
        "say little.",
        sortable=True,
    )


def _block(
    section: Section, removed: float, entries: Sequence[tuple[Series, ReportedRun]], names: Iterable[str]
) -> Iterator[Row]:
    columns = [_marked(section, [measured(point, name) for _, point in entries], name) for name in names]
    for i, (series, point) in enumerate(entries):
        kept, stored = point.record.size.get("retain_ratio"), point.record.size.get("bytes")
        yield Row(
            (
                Cell(removed_title(removed), value=removed, link=point.number),
                *series_cells(series),
                *(column[i] for column in columns),
                Cell(f"{100 * kept:.2f} %" if formats.is_number(kept) else formats.ABSENT, value=kept),
                Cell(formats.size(stored), value=stored),
            ),
            kind="block" if i == 0 else "",
        )
