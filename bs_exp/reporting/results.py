"""Tables of quality in the papers' layout: methods by ratio, and all metrics by ratio and method."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bs_exp.records import metrics
from bs_exp.records.comparison import STATED
from bs_exp.records.record import Status
from bs_exp.reporting import formats
from bs_exp.reporting.study import ReportedRun, Section, Series
from bs_exp.reporting.table import Cell, Column, Row, Table, mark_best, text

# A search tries another ratio in every trial: as columns they would be a table of holes.
_MOST_RATIOS = 12
_MOST_SAMPLES = 40
_LINE_ENDS = re.compile(r"(?:[ \t]*\n){4,}")
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
    yield from _samples(section, f"{key}-samples")


# Everywhere: what was asked to be kept, and beside it the papers' ratio.
RATIO = Column("kept (removed)", hint="share of the targeted parameters that was to be kept", key="retain_ratio")


def ratio_title(removed: float) -> str:
    """`80 % (-20 %)` for a fifth removed."""
    return f"{formats.share(round(1 - removed, 6))} (\u2212{formats.share(removed)})"


def ratio_cell(removed: float | None, link: int | None = None) -> Cell:
    """The ratio of a run; its value is the share to be kept."""
    if removed is None:
        return Cell(formats.ABSENT, link=link)
    return Cell(ratio_title(removed), value=round(1 - removed, 6), link=link)


def _samples(section: Section, key: str) -> Iterator[Table]:
    """How dense and compressed models continue a prompt, beside each other; a table for each prompt."""
    found: dict[str, list[tuple[Series, ReportedRun]]] = {}
    for series in section.series:
        for point in series.completed:
            if prompt := point.record.sample.get("prompt"):
                found.setdefault(prompt, []).append((series, point))
    columns = (RATIO, *series_columns(section), Column("writes", numeric=False))
    for i, (prompt, entries) in enumerate(found.items(), start=1):
        blank = [text("") for _ in section.dials]
        shown = sorted(entries, key=lambda entry: entry[1].removed or 0.0)[:_MOST_SAMPLES]
        whole = shown[0][1].record.sample.get("dense", "")
        rows = [Row((text(""), text("dense"), *blank, _written(whole)), kind="dense")]
        for series, point in shown:
            written = _written(point.record.sample.get("compressed", ""))
            rows.append(Row((ratio_cell(point.removed, point.number), *series_cells(series), written)))
        more = f" The first {len(shown)} of {len(entries)} runs." if len(shown) < len(entries) else ""
        note = f"Each continues “{prompt}” with its most likely tokens. One prompt measures nothing.{more}"
        yield Table(f"{key}-{i}", "What the models write", columns, tuple(rows), note=note)


def _written(value: str) -> Cell:
    """What a model wrote; of many line ends in a row, which some models write for ever, only how many there are."""
    shown = _LINE_ENDS.sub(lambda found: f"\n({found[0].count(chr(10))} line ends)\n", value)
    return text(shown.strip("\n"), style="wrap")


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
    columns += [Column(ratio_title(removed), key=f"{1 - removed:.6g}") for removed in section.ratios]
    columns += [Column("kept exactly", numeric=False, hint="shares of the targeted parameters, ratio by ratio")]
    cells = {
        removed: _marked(
            section,
            [measured(series.by_removed.get(removed), name) for series in section.series],
            [_kept(series.by_removed.get(removed)) for series in section.series],
            name,
        )
        for removed in section.ratios
    }
    dense = section.dense.get(name)
    whole = _dense_row(section, [dense] * len(section.ratios), [name] * len(section.ratios))
    rows = [Row((*whole.cells, text("")), kind="dense")]
    for i, series in enumerate(section.series):
        shares = (formats.percent(_kept(series.by_removed.get(removed))) for removed in section.ratios)
        kept = text(" · ".join(shares), style="muted")
        rows.append(Row((*series_cells(series), *(cells[removed][i] for removed in section.ratios), kept)))
    arrow = "lower is better" if metrics.lower_is_better(name) else "higher is better"
    return Table(
        key,
        f"{formats.sentence(metrics.title(name))} by share kept",
        tuple(columns),
        tuple(rows),
        note=f"Columns: share of the targeted parameters to be kept (removed). {arrow.capitalize()}; "
        f"{_best_words(section)}.",
    )


def _marked(section: Section, cells: list[Cell], shares: Sequence[float | None], name: str) -> list[Cell]:
    return cells if section.mixed else mark_best(cells, shares, lowest=metrics.lower_is_better(name))


def _best_words(section: Section) -> str:
    if section.mixed:
        return "NOT COMPARABLE between rows that were made from other texts or code, so none is the best"
    return STATED


def _dense_row(section: Section, values: Sequence[Any], names: Sequence[str], before: int = 0) -> Row:
    blank = [text("") for _ in section.dials]
    shown = (Cell(formats.metric(name, value), value=value) for name, value in zip(names, values, strict=True))
    return Row((*(text("") for _ in range(before)), text("dense"), *blank, *shown), kind="dense")


def _everything(section: Section, key: str) -> Table:
    names = section.quality
    columns = [RATIO, *series_columns(section)]
    columns += [Column(metrics.short_title(name), hint=metrics.title(name)) for name in names]
    columns += [Column("kept exactly", hint="share of the targeted parameters"), Column("size")]
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
        note=f"Within a ratio, {_best_words(section)}; differences below a standard error (shown on hovering) "
        "say little.",
        sortable=True,
    )


def _kept(point: ReportedRun | None) -> float | None:
    """The share of the targeted parameters that a point's model kept, if it is known."""
    return None if point is None else point.kept


def _block(
    section: Section, removed: float, entries: Sequence[tuple[Series, ReportedRun]], names: Iterable[str]
) -> Iterator[Row]:
    shares = [_kept(point) for _, point in entries]
    columns = [_marked(section, [measured(point, name) for _, point in entries], shares, name) for name in names]
    for i, (series, point) in enumerate(entries):
        stored = point.record.size.get("bytes")
        yield Row(
            (
                ratio_cell(removed, point.number),
                *series_cells(series),
                *(column[i] for column in columns),
                Cell(formats.percent(shares[i]), value=shares[i]),
                Cell(formats.size(stored), value=stored),
            ),
            kind="block" if i == 0 else "",
        )
