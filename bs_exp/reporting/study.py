"""Records in order: runs that may be compared are a section, those of it that differ in the ratio alone a series."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bs_exp.records import metrics
from bs_exp.records.comparison import equal_sizes
from bs_exp.records.inputs import CODE
from bs_exp.records.pairs import PairTable
from bs_exp.records.record import RunRecord, Status
from bs_exp.records.trials import TrialTable
from bs_exp.reporting import dials, formats
from bs_exp.reporting.collect import Claim, Collection, Skipped, Waiting
from bs_exp.reporting.dials import Flat
from bs_exp.types import PlannedGroup

# The column that tells rows of the same settings apart.
_MADE_FROM = "made from"


@dataclass(frozen=True, eq=False)
class ReportedRun:
    """A run; `number` identifies it in the report, counted from 1."""

    number: int
    record: RunRecord
    folder: Path

    @property
    def completed(self) -> bool:
        return self.record.status is Status.COMPLETED

    @property
    def ratio(self) -> float | None:
        """The retain ratio that was asked for, in (0, 1]; None if the configuration has none."""
        value = self.record.config.get("retain_ratio")
        return float(value) if formats.is_number(value) and 0.0 < value <= 1.0 else None

    @property
    def removed(self) -> float | None:
        """The papers' ratio: the share that was to be removed."""
        return None if self.ratio is None else round(1 - self.ratio, 6)

    @property
    def kept(self) -> float | None:
        """The share of the targeted parameters that the model kept; None if it is not known."""
        value = self.record.size.get("retain_ratio")
        return float(value) if self.completed and formats.is_number(value) else None

    @property
    def dense(self) -> Mapping[str, Any]:
        return self.record.metrics.get("dense", {})

    @property
    def compressed(self) -> Mapping[str, Any]:
        return self.record.metrics.get("compressed", {})

    @property
    def groups(self) -> tuple[PlannedGroup, ...]:
        """The groups of the plan with their ranks; none if the run ended before allocation."""
        plan = self.record.rank_plan
        return () if plan is None else plan.groups

    @cached_property
    def dials(self) -> Flat:
        return dials.recipe_dials(self.record.config, self.record.choices)


@dataclass(frozen=True, eq=False)
class Series:
    """Points of one method and one set of dials, by retain ratio; of repeated points, the last completed one."""

    method: str
    values: tuple[str, ...]
    label: str
    points: tuple[ReportedRun, ...]

    @cached_property
    def by_removed(self) -> Mapping[float, ReportedRun]:
        return {point.removed: point for point in self.points if point.removed is not None}

    @property
    def completed(self) -> list[ReportedRun]:
        """The completed points, from the least removed to the most."""
        done = [point for point in self.points if point.completed and point.removed is not None]
        return sorted(done, key=lambda point: point.removed or 0.0)


@dataclass(frozen=True, eq=False)
class Section:
    """Runs of one model under one evaluation: their results may be compared, except speeds."""

    title: str
    model: str
    dials: tuple[str, ...]
    series: tuple[Series, ...]
    points: tuple[ReportedRun, ...]

    @property
    def mixed(self) -> bool:
        """Whether rows were made from different texts or code, so that none is the best of a column."""
        return _MADE_FROM in self.dials

    @cached_property
    def ratios(self) -> list[float]:
        """Shares removed, in ascending order."""
        return sorted({removed for series in self.series for removed in series.by_removed})

    @cached_property
    def dense(self) -> Mapping[str, Any]:
        """The dense model's metrics, each from the first point that has it."""
        found: dict[str, Any] = {}
        for point in self.points:
            for name, value in point.dense.items():
                found.setdefault(name, value)
        return found

    @cached_property
    def quality(self) -> list[str]:
        """The metrics of the section, perplexities first."""
        return metrics.quality([self.dense, *(point.compressed for point in self.points)])

    @property
    def main_metric(self) -> str | None:
        """What methods are ranked by: the objective where the points agree on one, else the default."""
        asked = [point.record.config.get("objective") for point in self.points]
        if all(name == asked[0] for name in asked) and asked[0] in self.quality:
            return str(asked[0])
        return metrics.default_objective(self.quality) or next(iter(self.quality), None)

    def best(self, removed: float, metric: str) -> Series | None:
        """The series that is best at a ratio of those that kept the same; None if nothing was measured, or compares.

        Where methods kept more or less, the group of two equals or more counts that came closest to what was asked for.
        """
        if self.mixed:
            return None
        found = [
            (series, point)
            for series in self.series
            if (point := series.by_removed.get(removed)) is not None
            and point.completed
            and formats.is_number(point.compressed.get(metric))
        ]
        if not found:
            return None
        shares = [point.kept for _, point in found]
        groups = equal_sizes(shares) or [[0]]
        compared = [group for group in groups if len(group) > 1] or groups
        equals = min(compared, key=lambda group: max(abs((shares[i] or 0.0) - (1 - removed)) for i in group))
        better = min if metrics.lower_is_better(metric) else max
        return found[better(equals, key=lambda i: found[i][1].compressed[metric])][0]


@dataclass(frozen=True, eq=False)
class Repeat:
    """Points that are the same by their settings; the table shows the first of `points`."""

    points: tuple[ReportedRun, ...]
    same_hash: bool


@dataclass(frozen=True)
class Mixture:
    """Runs that are the same by their settings and were made from other content: of a model, a text or code."""

    what: str
    where: str
    kinds: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Study:
    """The content of a report, in order."""

    sections: tuple[Section, ...]
    points: tuple[ReportedRun, ...]
    repeats: tuple[Repeat, ...]
    skipped: tuple[Skipped, ...]
    waiting: tuple[Waiting, ...]
    pairs: tuple[PairTable, ...]
    claims: tuple[Claim, ...] = ()
    left: int = 0
    searches: tuple[TrialTable, ...] = ()
    mixtures: tuple[Mixture, ...] = ()

    @property
    def name(self) -> str:
        """The sweeps it is about, or the methods where there are few."""
        sweeps = dict.fromkeys(
            str(p.record.sweep["id"]) for p in self.points if p.record.sweep and "id" in p.record.sweep
        )
        names = list(sweeps or dict.fromkeys(point.record.method for point in self.points))
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def with_status(self, *statuses: Status) -> list[ReportedRun]:
        return [point for point in self.points if point.record.status in statuses]


def arrange(collection: Collection) -> Study:
    """The study that a collection of records holds."""
    points = tuple(ReportedRun(i, found.record, found.folder) for i, found in enumerate(collection.found, start=1))
    groups: dict[tuple[str, str], list[ReportedRun]] = defaultdict(list)
    for point in points:
        groups[_identity(point.record)].append(point)
    repeats: list[Repeat] = []
    mixtures: list[Mixture] = []
    parts = []
    for group in groups.values():
        models = _by_model(group)
        parts += [part for model in models for part in _by_text(model)]
        if len(models) > 1:
            kinds = tuple(_fingerprint(model) or formats.ABSENT for model in models)
            mixtures.append(Mixture("the model's weights", model_name(group[0].record), kinds))
    titles = _titles(parts)
    sections = tuple(_section(title, part, repeats, mixtures) for title, part in zip(titles, parts, strict=True))
    return Study(
        sections,
        points,
        tuple(repeats),
        collection.skipped,
        collection.waiting,
        collection.pairs,
        collection.claims,
        collection.left,
        collection.searches,
        tuple(mixtures),
    )


def model_name(record: RunRecord) -> str:
    """Hub id, folder or option of the model."""
    model = record.config.get("model")
    model = model if isinstance(model, Mapping) else {}
    if isinstance(value := model.get("name"), str):
        return value
    if isinstance(value := model.get("path"), str):
        return dials.base_names([value])[value]
    source = record.provenance.get("model", {}).get("source")
    if isinstance(source, str):
        return source
    target = str(model.get("_target_", "unknown model"))
    return target.rpartition(".")[2]


def _identity(record: RunRecord) -> tuple[str, str]:
    protocol = dials.protocol_dials(record.config, {})
    return model_name(record), str(sorted(protocol.items(), key=lambda item: item[0]))


def _noted(record: RunRecord, key: str, name: str) -> str | None:
    part = record.provenance.get(key)
    value = part.get(name) if isinstance(part, Mapping) else None
    return value if isinstance(value, str) else None


def _by_model(points: Sequence[ReportedRun]) -> list[list[ReportedRun]]:
    """Points of the same weights; those that never loaded any stay with the first."""
    return _apart(points, lambda point: _noted(point.record, "model", "fingerprint"))


def _fingerprint(points: Sequence[ReportedRun]) -> str | None:
    """The beginning of the fingerprint of a part's weights."""
    found = (_noted(point.record, "model", "fingerprint") for point in points)
    return next((value[:8] for value in found if value), None)


def _inputs(point: ReportedRun) -> str | None:
    """What a compressed model came from besides the dense one: its calibration windows, and code of others."""
    windows, code = _noted(point.record, "calibration", "sha256"), point.record.provenance.get(CODE)
    if windows is None:
        return None
    digest = hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest() if code else ""
    return f"windows {windows[:8]}" + (f", code {digest[:8]}" if digest else "")


def _apart(points: Sequence[ReportedRun], key: Callable[[ReportedRun], str | None]) -> list[list[ReportedRun]]:
    """Points by a key, in the order of its values; those without one stay with the first."""
    found = dict.fromkeys(value for point in points if (value := key(point)) is not None)
    if len(found) < 2:
        return [list(points)]
    first = next(iter(found))
    return [[point for point in points if (key(point) or first) == value] for value in found]


def _by_text(points: Sequence[ReportedRun]) -> list[list[ReportedRun]]:
    """Points that read the same evaluation text; those that never came so far stay with the first."""
    texts: dict[tuple[tuple[str, Any], ...], list[ReportedRun]] = {}
    without: list[ReportedRun] = []
    for point in points:
        text = tuple((k, v) for k, v in point.dense.items() if metrics.is_text_hash(k))
        texts.setdefault(text, []).append(point) if text else without.append(point)
    if not texts:
        return [without]
    parts = list(texts.values())
    parts[0] = sorted([*parts[0], *without], key=lambda point: point.number)
    return parts


def _titles(parts: Sequence[Sequence[ReportedRun]]) -> list[str]:
    """The model's name, and what tells its sections apart if it has several."""
    protocols = [dials.protocol_dials(part[0].record.config, part[0].record.choices) for part in parts]
    models = [model_name(part[0].record) for part in parts]
    titles: list[str] = []
    for i, model in enumerate(models):
        family = [protocols[j] for j, other in enumerate(models) if other == model]
        keys = dials.varying([family])
        names = dials.short_names(keys)
        words = [f"{names[key]} {dials.show(protocols[i], key)}" for key in keys if key in protocols[i]]
        title = " · ".join([model, *words])
        weights = {_fingerprint(part) for part, other in zip(parts, models, strict=True) if other == model}
        if len(weights - {None}) > 1:  # one name, several models
            title = f"{title} · weights {_fingerprint(parts[i]) or formats.ABSENT}"
        # The settings agree and the texts do not: other versions of what the text is made of.
        titles.append(f"{title} · text {titles.count(title) + 1}" if title in titles else title)
    return titles


def _section(title: str, points: Sequence[ReportedRun], repeats: list[Repeat], mixtures: list[Mixture]) -> Section:
    methods: dict[str, list[ReportedRun]] = defaultdict(list)
    for point in points:
        methods[point.record.method].append(point)
    order = list(methods)
    keys = dials.varying([[point.dials for point in family] for family in methods.values()])
    names = dials.short_names(keys)
    groups: dict[tuple[str, tuple[str, ...]], list[ReportedRun]] = defaultdict(list)
    short = {key: dials.base_names([dials.show(point.dials, key) for point in points]) for key in keys}
    for point in points:
        values = tuple(short[key][dials.show(point.dials, key)] for key in keys)
        groups[point.record.method, values].append(point)
    titles, mixed = [names[key] for key in keys], False
    for (method, values), group in groups.items():
        # A row holds what compares: settings that agree do not mean that texts and code do.
        if len(kinds := dict.fromkeys(found for point in group if (found := _inputs(point)))) > 1:
            mixed = True
            label = f"{title}: {_label(method, titles, values)}"
            mixtures.append(Mixture("calibration text or code", label, tuple(kinds)))
    if mixed:
        titles.append(_MADE_FROM)
        groups = {
            (method, (*values, _inputs(part[0]) or formats.ABSENT)): part
            for (method, values), group in groups.items()
            for part in _apart(group, _inputs)
        }
    series = tuple(
        Series(method, values, _label(method, titles, values), tuple(_unique(group, repeats)))
        for (method, values), group in sorted(groups.items(), key=lambda entry: order.index(entry[0][0]))
    )
    return Section(title, model_name(points[0].record), tuple(titles), series, tuple(points))


def _label(method: str, names: Sequence[str], values: Sequence[str]) -> str:
    words = [f"{name} {value}" for name, value in zip(names, values, strict=True) if value != formats.ABSENT]
    return " · ".join([method, *words])


def _unique(points: Sequence[ReportedRun], repeats: list[Repeat]) -> list[ReportedRun]:
    """One point per ratio: completed before unfinished, later before earlier."""
    by_ratio: dict[float | None, list[ReportedRun]] = defaultdict(list)
    for point in points:
        by_ratio[point.removed].append(point)
    for group in by_ratio.values():
        group.sort(key=lambda point: (point.completed, point.record.finished or point.record.started), reverse=True)
        if len(group) > 1:
            repeats.append(Repeat(tuple(group), len({point.record.config_hash for point in group}) == 1))
    return [group[0] for group in by_ratio.values()]
