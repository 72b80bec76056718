"""Provenance: all runs, their environments, and problems."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bs_exp.printable import printable
from bs_exp.records import metrics
from bs_exp.records.record import FILE_NAME, RunRecord, Status
from bs_exp.reporting import cost, formats
from bs_exp.reporting.results import RATIO, ratio_cell
from bs_exp.reporting.study import Repeat, ReportedRun, Study
from bs_exp.reporting.table import Cell, Column, Row, Table, text


@dataclass(frozen=True, eq=False)
class Environment:
    """One combination of source, versions and hardware, and the runs in it."""

    letter: str
    record: RunRecord
    points: list[ReportedRun] = field(default_factory=list)

    @property
    def source(self) -> str:
        source = self.record.source
        if not source or not source.get("commit"):
            return "no git checkout"
        return f"{source['commit']}{' with changes that are not committed' if source.get('dirty') else ''}"

    @property
    def versions(self) -> str:
        found = self.record.versions
        return ", ".join(f"{name} {version}" for name, version in found.items() if version) or formats.ABSENT

    @property
    def hardware(self) -> str:
        found = self.record.hardware
        gpus = [f"{gpu.get('name')} ({formats.size(gpu.get('memory_bytes'))})" for gpu in found.get("gpus") or ()]
        parts = [
            *gpus,
            f"{found.get('cpu', 'unknown CPU')}, {found.get('cpu_cores', '?')} cores, "
            f"{found.get('cpu_threads', '?')} threads",
            f"{formats.size(found.get('memory_bytes'))} of memory",
            str(found.get("system", "")),
        ]
        return "; ".join(part for part in parts if part)


def environments(study: Study) -> list[Environment]:
    """Each environment once, in order of appearance."""
    found: dict[str, Environment] = {}
    for point in study.points:
        record = point.record
        key = json.dumps([record.source, record.versions, record.hardware], sort_keys=True, default=str)
        if key not in found:
            found[key] = Environment(_letter(len(found)), record)
        found[key].points.append(point)
    return list(found.values())


def _letter(i: int) -> str:
    return (_letter(i // 26 - 1) if i >= 26 else "") + chr(ord("A") + i % 26)


def command(record: RunRecord) -> str:
    """The command line of a run, quoted for a shell; programs by their names, wherever they lie."""
    words = list(map(str, record.command))
    for i in range(min(2, len(words))):
        if words[i].startswith("/"):
            words[i] = words[i].rpartition("/")[2]
    return shlex.join(words)


def record_links(study: Study, out: Path) -> dict[int, str]:
    """Run -> its record.json as a page in the folder `out` links it; folders can be moved together."""
    here = out.resolve()
    links: dict[int, str] = {}
    for point in study.points:
        place = os.path.relpath((point.folder / FILE_NAME).resolve(), here)
        # What a name holds is no part of a link: neither a scheme nor a query. Surrogates stand for bytes.
        links[point.number] = "./" + quote(os.fsencode(place))
    return links


def all_runs(study: Study, places: list[Environment]) -> Table:
    """One row per record, whatever became of it; as CSV the complete data."""
    names = metrics.quality(point.compressed for point in study.points)
    letters = {point: place.letter for place in places for point in place.points}
    series = {point: series for section in study.sections for series in section.series for point in series.points}
    titles = {point: section for section in study.sections for point in section.points}
    columns = [Column("run"), *_words("status", "model", "method", "dials"), RATIO]
    columns += [*map(Column, names), *map(Column, ("decode tok/s", "size", "took"))]
    columns += _words("environment", "commit", "configuration", "started", "folder")
    rows = []
    for point in study.points:
        record = point.record
        label = series[point].label.partition(" · ")[2] if point in series else "repeated"
        commit = str((record.source or {}).get("commit") or formats.ABSENT)
        stored, took = record.size.get("bytes"), sum(cost.own_timings(point).values())
        speed = point.compressed.get(metrics.DECODE)
        cells = [
            _run(point),
            text(record.status.value, style="bad" if record.status is Status.FAILED else ""),
            text(titles[point].title),
            text(record.method),
            text(label),
            _removed(point),
            *(_metric(name, point.compressed.get(name)) for name in names),
            Cell(formats.number(speed), value=speed),
            Cell(formats.size(stored), value=stored),
            Cell(formats.seconds(took), value=took),
            text(letters[point]),
            Cell(commit[:10], value=commit),
            Cell(record.config_hash[:8], value=record.config_hash),
            text(record.started),
            text(printable(str(point.folder))),
        ]
        rows.append(Row(tuple(cells)))
    return _without_empty(Table("runs", "All runs", tuple(columns), tuple(rows), sortable=True))


def _without_empty(found: Table) -> Table:
    """The table without columns in which nothing stands."""
    kept = [
        i for i in range(len(found.columns)) if any(row.cells[i].text not in ("", formats.ABSENT) for row in found.rows)
    ]
    rows = tuple(replace(row, cells=tuple(row.cells[i] for i in kept)) for row in found.rows)
    return replace(found, columns=tuple(found.columns[i] for i in kept), rows=rows)


def _metric(name: str, value: Any) -> Cell:
    return Cell(formats.metric(name, value), value=value)


def problems(study: Study) -> Iterator[Table]:
    """Results of other inputs, points without one, records that cannot be read, points that were run twice."""
    if study.mixtures:
        yield Table(
            "mixed",
            "Not comparable: same settings, other inputs",
            _words("what changed", "where", "found"),
            tuple(
                Row((text(m.what, style="bad"), text(m.where, style="wrap"), text("; ".join(m.kinds), style="wrap")))
                for m in study.mixtures
            ),
            note="These records say the same settings, and were made from different models, texts or code under the "
            "same names. They stand in sections and rows of their own: compare within one only.",
        )
    if broken := study.with_status(Status.FAILED, Status.INTERRUPTED):
        yield _failed(broken)
    if running := study.with_status(Status.RUNNING):
        yield _unfinished(running)
    if study.waiting:
        yield Table(
            "waiting",
            "Not started",
            _words("sweep", "settings"),
            tuple(Row((text(p.sweep), text(p.settings, style="wrap"))) for p in study.waiting),
            note="Points of a sweep that have no record yet. The same command again runs what is missing.",
        )
    if study.skipped:
        yield Table(
            "skipped",
            "Files that cannot be read",
            _words("file", "why"),
            tuple(Row((text(printable(str(item.path))), text(item.reason, style="wrap"))) for item in study.skipped),
            note="Nothing of them is in the tables.",
        )
    if study.repeats:
        yield _repeated(study.repeats)


def _failed(points: Sequence[ReportedRun]) -> Table:
    rows = []
    for point in points:
        error = point.record.error or {}
        found = (str(error.get(key) or formats.ABSENT) for key in ("stage", "type", "message"))
        stage, kind, message = found
        status = text(point.record.status.value, style="bad")
        what = (text(stage), text(kind), text(message, style="wrap"))
        rows.append(Row((_run(point), status, text(point.record.method), _removed(point), *what)))
    columns = (Column("run"), *_words("status", "method"), RATIO, *_words("stage", "error", "message"))
    return Table("failed", "Failed or stopped", columns, tuple(rows))


def _unfinished(points: Sequence[ReportedRun]) -> Table:
    rows = tuple(
        Row(
            (
                _run(point),
                text(point.record.method),
                _removed(point),
                text(point.record.started),
                text(", ".join(point.record.timings) or "none"),
            )
        )
        for point in points
    )
    columns = (Column("run"), *_words("method"), RATIO, *_words("started", "stages done"))
    return Table("unfinished", "Unfinished", columns, rows, note="Killed, or still at work when this page was made.")


def _repeated(repeats: Sequence[Repeat]) -> Table:
    rows = tuple(
        Row(
            (
                text(repeat.points[0].record.method),
                _removed(repeat.points[0]),
                _run(repeat.points[0]),
                text(", ".join(f"{point.number} ({point.record.status})" for point in repeat.points[1:])),
                text(repeat.points[0].record.config_hash[:8] if repeat.same_hash else "differ in what is not a dial"),
            )
        )
        for repeat in repeats
    )
    columns = (*_words("method"), RATIO, Column("shown"), *_words("not shown", "configuration"))
    note = "Runs with the same settings: tables and figures show the last completed one."
    return Table("repeated", "Run more than once", columns, rows, note=note)


def _words(*titles: str) -> tuple[Column, ...]:
    return tuple(Column(title, numeric=False) for title in titles)


def _run(point: ReportedRun) -> Cell:
    return Cell(str(point.number), value=point.number, link=point.number)


def _removed(point: ReportedRun) -> Cell:
    return ratio_cell(point.removed)
