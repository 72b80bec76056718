"""Tables of speed and cost: throughput and latency, seconds per stage, and when a compression has paid for itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bs_exp.evaluation.cost import break_even_tokens
from bs_exp.records import metrics
from bs_exp.records.stages import BEFORE_COMPRESSION, COMPRESSION, Stage, evaluated_model
from bs_exp.reporting import formats
from bs_exp.reporting.results import RATIO, ratio_cell, series_cells, series_columns
from bs_exp.reporting.study import ReportedRun, Section, Series
from bs_exp.reporting.table import Cell, Column, Row, Table, text

# Stages that the phases below are made of, where they are not one stage alone.
_PHASES: dict[str, str] = {
    Stage.CONFIGURE: "load",
    Stage.ESTIMATE: "load",
    Stage.CHECK_EVALUATION: "load",
    Stage.COMPRESS: "other compression",
    Stage.TOKENISE: "calibrate",
    Stage.PROFILE: "calibrate",
    Stage.GROUP: "allocate",
}
_EVALUATE = "evaluate "
# In milliseconds a stage says nothing.
_SHORT = 0.05
_MOST_STAGES = 60
_SETTINGS = ("device", "dtype", "batch_size", "prompt_length", "generated_length")


@dataclass(frozen=True)
class SpeedSetting:
    """How throughput was measured. Numbers of two settings are never compared."""

    values: tuple[Any, ...]

    @classmethod
    def of(cls, point: ReportedRun) -> SpeedSetting:
        return cls(tuple(point.compressed.get(metrics.metric(metrics.THROUGHPUT, name)) for name in _SETTINGS))

    @property
    def label(self) -> str:
        device, dtype, batch, prompt, generated = (formats.number(value) for value in self.values)
        return f"{device}, {dtype}, batch {batch}, {prompt} prompt and {generated} generated tokens"


def speed_settings(section: Section) -> dict[SpeedSetting, list[tuple[Series, ReportedRun]]]:
    """Completed points with a throughput, by the way it was measured."""
    found: dict[SpeedSetting, list[tuple[Series, ReportedRun]]] = {}
    for series in section.series:
        for point in series.completed:
            if metrics.DECODE in point.compressed:
                found.setdefault(SpeedSetting.of(point), []).append((series, point))
    return found


def compression_seconds(point: ReportedRun) -> float:
    """Seconds of the compression, without loading and evaluation."""
    if Stage.COMPRESS in point.record.timings:
        return point.record.timings[Stage.COMPRESS]
    return sum(point.record.timings.get(stage, 0.0) for stage in COMPRESSION)


@dataclass(frozen=True, eq=False)
class SharedCost:
    """What points of one sweep took together and the first of them alone, in seconds, evaluation aside."""

    first: ReportedRun
    points: int
    first_seconds: float
    all_seconds: float

    @property
    def times(self) -> float:
        """The cost of all points in units of the first one's: the number of points if they share nothing."""
        return self.all_seconds / self.first_seconds


def seconds_without_evaluation(point: ReportedRun) -> float:
    """Seconds of a run, without evaluation."""
    return sum(seconds for phase, seconds in phases(point).items() if not phase.startswith(_EVALUATE))


def shared_costs(series: Series) -> list[SharedCost]:
    """For each sweep that ran points of a series at two ratios or more, what they cost beside the first of them."""
    sweeps: dict[str, list[ReportedRun]] = {}
    for point in series.completed:
        if point.record.sweep and point.record.timings:
            sweeps.setdefault(str(point.record.sweep.get("id")), []).append(point)
    return [_shared(points) for points in sweeps.values() if len(points) > 1]


def _shared(points: Sequence[ReportedRun]) -> SharedCost:
    first = min(points, key=lambda point: (point.record.started, point.number))
    # No run is free; and a record that says so must not divide by zero.
    own = max(seconds_without_evaluation(first), 1e-9)
    return SharedCost(first, len(points), own, sum(seconds_without_evaluation(point) for point in points))


def used_cache(point: ReportedRun) -> bool:
    """Whether cached work was reused, so that the timings are shorter than those of a fresh run."""
    return any(count for count in point.record.cache.get("hits", {}).values())


def cost_tables(section: Section, key: str) -> Iterator[Table]:
    """Speed for each way of measuring it, break-even, and seconds per stage."""
    for i, (setting, entries) in enumerate(speed_settings(section).items(), start=1):
        yield _speed(section, setting, entries, f"{key}-speed-{i}")
        yield _break_even(section, setting, entries, f"{key}-break-even-{i}")
    shared = [(series, cost) for series in section.series for cost in shared_costs(series)]
    if shared:
        yield _sharing(section, shared, f"{key}-shared")
    if any(point.record.timings for point in section.points):
        yield _timings(section, f"{key}-timings")


def _speed(section: Section, setting: SpeedSetting, entries: list[tuple[Series, ReportedRun]], key: str) -> Table:
    columns = [RATIO, *series_columns(section)]
    columns += [Column("prefill tok/s"), Column("against dense"), Column("decode tok/s"), Column("against dense")]
    columns += [Column("ms per token", hint="one decoding step of the whole batch")]
    peak = metrics.PEAK_MEMORY
    with_memory = any(peak in point.compressed for _, point in entries)
    columns += [Column("peak memory")] if with_memory else []
    rows = []
    first = entries[0][1]
    dense = [text(""), text("dense"), *(text("") for _ in section.dials)]
    for name in (metrics.PREFILL, metrics.DECODE):
        dense += [_with_spread(first.dense, name), text("")]
    dense.append(_latency(first.dense))
    dense += [_bytes(first.dense.get(peak))] if with_memory else []
    rows.append(Row(tuple(dense), kind="dense"))
    for series, point in sorted(entries, key=lambda entry: entry[1].removed or 0.0):
        cells = [
            ratio_cell(point.removed, point.number),
            *series_cells(series),
        ]
        for name in (metrics.PREFILL, metrics.DECODE):
            cells += [_with_spread(point.compressed, name), _against_dense(point, name)]
        cells.append(_latency(point.compressed))
        cells += [_bytes(point.compressed.get(peak))] if with_memory else []
        rows.append(Row(tuple(cells)))
    return Table(
        key,
        "Throughput and latency",
        tuple(columns),
        tuple(rows),
        note=f"{setting.label}. Medians; on hovering, the slowest and the fastest run. Every point was timed in turns "
        "with the dense model, round by round, and the change is the median over rounds; on hovering, its 95 % "
        "interval. Where that holds 1, the machine's own speed changed by more, or the two were timed apart, no "
        "difference was measured. The first row is the dense model beside the first point.",
        sortable=True,
    )


def _with_spread(found: Any, name: str) -> Cell:
    low, high = found.get(name + metrics.SLOWEST), found.get(name + metrics.FASTEST)
    hint = f"{formats.number(low)} to {formats.number(high)}" if formats.is_number(low) else ""
    return Cell(_whole(found.get(name)), value=found.get(name), hint=hint)


def _against_dense(point: ReportedRun, name: str) -> Cell:
    low, high = (point.compressed.get(name + end) for end in (metrics.SPEEDUP_LOW, metrics.SPEEDUP_HIGH))
    hint = (
        f"{low:.3f} to {high:.3f} times the dense speed" if formats.is_number(low) and formats.is_number(high) else ""
    )
    speedup = metrics.measured_speedup(point.compressed, name)
    if speedup is None:
        return Cell(metrics.NO_DIFFERENCE, style="muted", hint=hint)
    return Cell(formats.change(speedup, 1.0), value=speedup, style="good" if speedup > 1 else "muted", hint=hint)


def _whole(value: Any) -> str:
    return f"{value:,.0f}" if formats.is_number(value) and value >= 100 else formats.number(value)


def _latency(found: Any) -> Cell:
    speed, batch = found.get(metrics.DECODE), found.get(metrics.metric(metrics.THROUGHPUT, "batch_size"))
    if not (formats.is_number(speed) and formats.is_number(batch)) or speed <= 0:
        return Cell(formats.ABSENT, style="muted")
    milliseconds = 1000 * batch / speed
    return Cell(f"{milliseconds:.2f}" if milliseconds < 100 else f"{milliseconds:.0f}", value=milliseconds)


def _bytes(value: Any) -> Cell:
    return Cell(formats.size(value), value=value)


def _break_even(section: Section, setting: SpeedSetting, entries: list[tuple[Series, ReportedRun]], key: str) -> Table:
    columns = [RATIO, *series_columns(section), Column("compressing took")]
    columns += [Column("prompt tokens"), Column("generated tokens"), Column("reused", numeric=False)]
    rows = []
    for series, point in sorted(entries, key=lambda entry: entry[1].removed or 0.0):
        cost = compression_seconds(point)
        cells = [
            ratio_cell(point.removed, point.number),
            *series_cells(series),
        ]
        cells.append(Cell(formats.seconds(cost), value=cost))
        for name in (metrics.PREFILL, metrics.DECODE):
            cells.append(_tokens(point, name, cost))
        rows.append(Row((*cells, text(_reused(point), style="muted"))))
    return Table(
        key,
        "Break-even: tokens until compressing has paid for itself",
        tuple(columns),
        tuple(rows),
        note=f"Seconds of compression divided by the seconds saved per token, {setting.label}. There is none where the "
        "compressed model is not faster, or no difference was measured (see above). Work that came from a cache was "
        "not paid in this run.",
        sortable=True,
    )


def _tokens(point: ReportedRun, name: str, cost: float) -> Cell:
    dense, speedup = point.dense.get(name), metrics.measured_speedup(point.compressed, name)
    if speedup is None or not formats.is_number(dense) or dense <= 0:
        return Cell(metrics.NO_DIFFERENCE, style="muted")
    if speedup <= 1:
        return Cell("never: slower", style="muted")
    tokens = break_even_tokens(cost, dense, dense * speedup)
    return Cell(f"{tokens:,.0f}" if tokens < 1e7 else f"{tokens:.2e}", value=tokens)


def _reused(point: ReportedRun) -> str:
    hits = point.record.cache.get("hits", {})
    return ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in hits.items() if count) or "nothing"


def own_timings(point: ReportedRun) -> dict[str, float]:
    """Seconds by stage, none counted twice: the stage around compression keeps only what its inner stages leave."""
    timings = dict(point.record.timings)
    if Stage.COMPRESS in timings:
        inside = sum(timings.get(stage, 0.0) for stage in COMPRESSION if stage not in BEFORE_COMPRESSION)
        timings[Stage.COMPRESS] = max(0.0, timings[Stage.COMPRESS] - inside)
    return timings


def phases(point: ReportedRun) -> dict[str, float]:
    """Seconds by phase: the stages of compression, and all of loading and of either evaluation together."""
    found: dict[str, float] = {}
    for stage, seconds in own_timings(point).items():
        model = evaluated_model(stage)
        phase = _PHASES.get(stage, stage) if model is None else f"{_EVALUATE}{model}"
        found[phase] = found.get(phase, 0.0) + seconds
    return found


def stages(points: Sequence[ReportedRun]) -> list[str]:
    """Stages that took time in some run, in the order in which runs meet them: the 60 that took most in one run."""
    longest: dict[str, float] = {}
    for point in points:
        for stage, seconds in own_timings(point).items():
            longest[stage] = max(longest.get(stage, 0.0), seconds)
    kept = sorted((stage for stage, seconds in longest.items() if seconds >= _SHORT), key=lambda s: -longest[s])
    return [stage for stage in longest if stage in set(kept[:_MOST_STAGES])]


def _sharing(section: Section, shared: Sequence[tuple[Series, SharedCost]], key: str) -> Table:
    columns = [*series_columns(section), Column("ratios"), Column("first point"), Column("all points")]
    columns += [Column("times the first"), Column("the first reused", numeric=False)]
    rows = []
    for series, cost in shared:
        cells = [*series_cells(series), Cell(str(cost.points), value=cost.points)]
        cells += [Cell(formats.seconds(cost.first_seconds), value=cost.first_seconds, link=cost.first.number)]
        cells += [Cell(formats.seconds(cost.all_seconds), value=cost.all_seconds)]
        cells += [Cell(f"{cost.times:.2f}", value=cost.times), text(_reused(cost.first), style="muted")]
        rows.append(Row(tuple(cells)))
    return Table(
        key,
        "What all ratios of a sweep cost beside the first",
        tuple(columns),
        tuple(rows),
        note="Seconds of runs, evaluation aside. The first point loads the model, and makes the Grams and "
        "decompositions that the others cut at their own ranks; where it reused some, the number says less.",
        sortable=True,
    )


def _timings(section: Section, key: str) -> Table:
    names = stages(section.points)
    columns = [RATIO, *series_columns(section), *(Column(f"{name}, s") for name in names)]
    columns += [Column("all, s"), Column("peak memory", hint="of the process since it began, earlier runs included")]
    rows = []
    for series in section.series:
        for point in series.points:
            own = own_timings(point)
            spent, total = [own.get(name) for name in names], sum(own.values())
            cells = [ratio_cell(point.removed, point.number), *series_cells(series)]
            cells += [Cell(formats.ABSENT if s is None else f"{s:.1f}", value=s) for s in spent]
            cells += [Cell(f"{total:.1f}", value=total), _bytes(point.record.memory.get("process_bytes"))]
            rows.append(Row(tuple(cells)))
    return Table(
        key,
        "Seconds per stage",
        tuple(columns),
        tuple(rows),
        note="Stages below 0.05 s everywhere are left out. What a cache or an earlier point of the sweep had done "
        "already costs nothing here. 'compress' is what its stages leave unexplained.",
        sortable=True,
    )
