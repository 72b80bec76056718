"""All runs as tidy data: a row per run, a column per dial and metric; and what sets any two runs apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bs_exp.records import metrics
from bs_exp.records.settings import WITHOUT_EFFECT
from bs_exp.reporting import cost, dials, formats
from bs_exp.reporting.study import ReportedRun, Study
from bs_exp.reporting.table import Cell, Column, Row, Table

# A page with the settings of more runs, or more settings that differ, would be too large for a browser.
_MOST_RUNS, _MOST_KEYS = 400, 400
_LONGEST_VALUE = 300


def tidy_table(study: Study) -> Table:
    """One row per run; numbers are numbers, and every setting that differs between runs has a column of its own."""
    flat = [_settings(point) for point in study.points]
    keys = _differing(flat)
    names = metrics.quality([found for point in study.points for found in (point.dense, point.compressed)])
    rates = [name for name in (metrics.PREFILL, metrics.DECODE) if any(name in p.compressed for p in study.points)]
    titles = {point: section.title for section in study.sections for point in section.points}
    columns = [
        "run",
        "status",
        "model",
        "method",
        "retain_ratio",
        "kept",
        *(key for key in keys if key != "retain_ratio"),
    ]
    columns += [f"{model}/{name}" for name in (*names, *rates) for model in ("dense", "compressed")]
    columns += ["bytes", "dense_bytes", "compress_seconds", "all_seconds", "started", "config_hash", "folder"]
    rows = []
    for point, settings in zip(study.points, flat, strict=True):
        record = point.record
        values = [point.number, record.status.value, titles.get(point, ""), record.method, point.ratio, point.kept]
        values += [settings.get(key) for key in keys if key != "retain_ratio"]
        values += [found.get(name) for name in (*names, *rates) for found in (point.dense, point.compressed)]
        values += [record.size.get("bytes"), record.size.get("dense_bytes"), cost.compression_seconds(point)]
        values += [sum(cost.own_timings(point).values()), record.started, record.config_hash, str(point.folder)]
        rows.append(Row(tuple(_cell(value) for value in values)))
    return Table("points", "Points", tuple(map(Column, columns)), tuple(rows))


def differences(study: Study) -> str:
    """JSON for the page: the settings that differ between runs, and their values by run; empty if they are too many."""
    if not 1 < len(study.points) <= _MOST_RUNS:
        return ""
    flat = [_settings(point) for point in study.points]
    keys = _differing(flat)
    if not keys or len(keys) > _MOST_KEYS:
        return ""
    runs = [
        {
            "run": point.number,
            "label": label(point),
            "values": [formats.setting(settings[key])[:_LONGEST_VALUE] if key in settings else None for key in keys],
        }
        for point, settings in zip(study.points, flat, strict=True)
    ]
    return json.dumps({"keys": keys, "runs": runs})


def label(point: ReportedRun) -> str:
    """A run in a word or two."""
    return point.record.method if point.ratio is None else f"{point.record.method}@{point.ratio:g}"


def _settings(point: ReportedRun) -> dict[str, Any]:
    """Every setting that can change a result, flat; options of groups under the group's name."""
    config = {key: value for key, value in point.record.config.items() if key not in WITHOUT_EFFECT}
    options = {group: option for group, option in point.record.choices.items() if group in config}
    found = {
        key: value for key, value in dials.flatten(config).items() if key.rpartition("._target_")[0] not in options
    }
    return options | found


def _differing(flat: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for settings in flat for key in settings)
    marks = {key: {formats.setting(s[key]) if key in s else None for s in flat} for key in keys}
    return sorted((key for key in keys if len(marks[key]) > 1), key=lambda key: (key.count("."), key))


def _cell(value: Any) -> Cell:
    if value is None:
        return Cell("")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(formats.number(value), value=value)
    return Cell(formats.setting(value))
