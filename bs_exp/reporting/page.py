"""The page: one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined

from bs_exp.printable import printable
from bs_exp.records import metrics
from bs_exp.records.record import Status
from bs_exp.reporting import cost, formats, runs
from bs_exp.reporting.drawing import Drawn
from bs_exp.reporting.results import ratio_title
from bs_exp.reporting.study import ReportedRun, Section, Study
from bs_exp.reporting.table import Table


@dataclass(frozen=True)
class Chapter:
    """The content of one section of the page, ready for the template."""

    section: Section
    results: Sequence[Table]
    ranks: Table | None
    agreement: Sequence[Table]
    cost: Sequence[Table]
    quality_figures: Sequence[Drawn]
    cost_figures: Sequence[Drawn]
    rank_figures: Sequence[Drawn]


@dataclass(frozen=True)
class Contents:
    """Everything on the page, in order."""

    study: Study
    chapters: Sequence[Chapter]
    pairs: Sequence[Drawn]
    searches: Sequence[Drawn]
    papers: Sequence[Table]
    problems: Sequence[Table]
    all_runs: Table
    environments: Sequence[runs.Environment]
    settings: str  # JSON of what sets runs apart
    records: Mapping[int, str]  # link by run


@dataclass(frozen=True)
class Winner:
    """Who is best at a ratio, for the summary."""

    ratio: str
    label: str
    value: str
    change: str
    number: int


def to_html(contents: Contents) -> str:
    """The whole page. Every text of a record is escaped; no script but ours may run, whatever a record says."""
    environment = Environment(
        loader=PackageLoader("bs_exp.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = _part("page.css"), _part("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    study = contents.study
    return environment.get_template("page.html.j2").render(
        style=style,
        script=script,
        script_hash=f"sha256-{digest}",
        contents=contents,
        study=study,
        # Names of sweeps are long: lines end behind a sign, not in a word.
        title=re.split(r"(?<=[,=_/])", study.name),
        facts=_facts(study),
        summaries=[(c.section, winners(c.section), _about(c.section)) for c in contents.chapters],
        main_metric=lambda section: metrics.title(section.main_metric) if section.main_metric else "",
        command=runs.command,
        ratio=ratio_title,
        number=formats.number,
        seconds=formats.seconds,
        details=_details,
        period=_period(study),
    )


def winners(section: Section) -> list[Winner]:
    """The best series at every ratio of a section, at most seven of them, spread evenly."""
    name = section.main_metric
    if name is None:
        return []
    found = [(removed, best) for removed in section.ratios if (best := section.best(removed, name)) is not None]
    if len(found) > 7:
        found = [found[round(i * (len(found) - 1) / 6)] for i in range(7)]
    return [
        Winner(
            ratio_title(removed),
            best.label,
            formats.metric(name, (point := best.by_removed[removed]).compressed[name]),
            formats.change(point.compressed[name], section.dense.get(name)),
            point.number,
        )
        for removed, best in found
    ]


def _facts(study: Study) -> list[tuple[str, str, str]]:
    """(number, word, CSS class) of the header's counts."""
    completed = len(study.with_status(Status.COMPLETED))
    failed = len(study.with_status(Status.FAILED, Status.INTERRUPTED))
    unfinished = len(study.with_status(Status.RUNNING))
    methods = len({point.record.method for point in study.points})
    models = len({section.model for section in study.sections})
    facts = [(completed, "point", "completed", ""), (methods, "method", "", ""), (models, "model", "", "")]
    facts += [(failed, "point", "failed or stopped", "bad"), (unfinished, "point", "unfinished", "bad")]
    facts += [(len(study.waiting), "point", "not started", "bad")]
    facts += [(study.left, "point", "no longer in the sweep, not shown", "left")]
    facts += [(len(study.skipped), "file", "cannot be read", "bad")]
    return [
        (str(count), f"{word}{'' if count == 1 else 's'} {rest}".strip(), style)
        for count, word, rest, style in facts
        if count or not style
    ]


def _about(section: Section) -> list[tuple[str, str]]:
    """What was run, for the summary."""
    ratios = [ratio_title(removed) for removed in section.ratios]
    speeds = [setting.label for setting in cost.speed_settings(section)]
    gpus = dict.fromkeys(str(gpu.get("name")) for p in section.points for gpu in p.record.hardware.get("gpus") or ())
    cpus = dict.fromkeys(str(point.record.hardware.get("cpu", "")) for point in section.points)
    spent = sum(sum(cost.own_timings(point).values()) for point in section.points)
    facts = [
        ("methods", ", ".join(dict.fromkeys(series.method for series in section.series))),
        ("dials", ", ".join(section.dials)),
        ("kept", ", ".join(ratios) if len(ratios) <= 8 else f"{ratios[0]} to {ratios[-1]}, {len(ratios)} ratios"),
        ("judged by", ", ".join(metrics.title(name) for name in section.quality)),
        ("speed", "; ".join(speeds)),
        ("hardware", ", ".join(gpus or cpus)),
        ("time", formats.seconds(spent) if spent else ""),
    ]
    return [(name, words) for name, words in facts if words]


def _details(point: ReportedRun) -> list[tuple[str, str]]:
    """Details of a run besides its metrics."""
    record = point.record
    error = record.error or {}
    facts = [
        ("folder", printable(str(point.folder))),
        ("run", record.run_id),
        ("configuration", record.config_hash),
        ("sweep", f"{record.sweep.get('id')}, job {record.sweep.get('job')}" if record.sweep else ""),
        ("point", " ".join(map(str, record.sweep.get("settings", ()))) if record.sweep else ""),
        ("started", record.started),
        ("finished", record.finished or ""),
        ("stages", ", ".join(f"{stage} {formats.seconds(spent)}" for stage, spent in record.timings.items())),
        ("error", f"{error.get('type')} in {error.get('stage')}: {error.get('message')}" if error else ""),
        ("model folder", record.model_folder or ""),
    ]
    return [(name, words) for name, words in facts if words]


def _period(study: Study) -> str:
    days = sorted(point.record.started[:10] for point in study.points)
    return days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"


def _part(name: str) -> str:
    return (resources.files("bs_exp.reporting") / "templates" / name).read_text(encoding="utf-8")
