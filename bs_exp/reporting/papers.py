"""Measured numbers beside those that papers report for the same model, ratio and metric.

The two come from different protocols, so every difference that is known is listed with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bs_exp.records import metrics
from bs_exp.reporting import cost, dials, formats
from bs_exp.reporting.literature import DENSE, Literature, Method, Reported, literature
from bs_exp.reporting.results import RATIO, ratio_cell, ratio_title
from bs_exp.reporting.study import ReportedRun, Section, Series, Study, model_name
from bs_exp.reporting.table import Cell, Column, Row, Table, text

_SEVEN = ("openbookqa", "arc_easy", "arc_challenge", "winogrande", "hellaswag", "piqa", "mathqa")
_MEANS = {"mean7": _SEVEN, "mean6": tuple(task for task in _SEVEN if task != "arc_challenge")}
_PREFILL, _GENERATE, _SECONDS = "speedup/prefill", "speedup/generate", "seconds/compress"
_SPEED = {
    "device": "device",
    "batch_size": "batch",
    "prompt_length": "prompt tokens",
    "generated_length": "generated tokens",
}
# Shares that differ by less are the same: ranks are whole numbers.
_SAME_SHARE = 0.005


@dataclass(frozen=True, eq=False)
class PaperComparison:
    """A measured and a reported number of the same model, ratio and metric. `series` is None for the dense model."""

    section: Section
    series: Series | None
    point: ReportedRun
    measured: float
    reported: Reported
    differences: tuple[str, ...]


def measured_value(found: Mapping[str, Any], metric: str) -> float | None:
    """A metric of a record; the papers' means are taken over exactly their tasks."""
    if metric in _MEANS:
        values = [found.get(metrics.metric(metrics.ACC, task)) for task in _MEANS[metric]]
        if not all(formats.is_number(value) for value in values):
            return None
        return sum(float(value) for value in values if value is not None) / len(values)
    value = found.get(metric)
    return float(value) if value is not None and formats.is_number(value) else None


def measured_by(point: ReportedRun, metric: str) -> float | None:
    """A metric of a point as papers report it. Times are compared on accelerators only: none is of a CPU."""
    if metric == _PREFILL:
        return _speedup(point, 0)
    if metric == _GENERATE:
        return _speedup(point, _measured_with(point, "generated_length"))
    if metric == _SECONDS:
        device = str(point.record.provenance.get("model", {}).get("device", "cpu"))
        return None if device == "cpu" or not point.record.timings else cost.compression_seconds(point)
    return measured_value(point.compressed, metric)


def _speedup(point: ReportedRun, generated: Any) -> float | None:
    """The dense model's time for a prompt and so many generated tokens, over the compressed one's.

    None where no difference was measured between the two in one of them that counts.
    """
    if str(_measured_with(point, "device") or "cpu").startswith("cpu"):
        return None
    dense, compressed = 0.0, 0.0
    for rate, tokens in ((metrics.PREFILL, _measured_with(point, "prompt_length")), (metrics.DECODE, generated)):
        if not formats.is_number(tokens) or not formats.is_number(point.dense.get(rate)) or point.dense[rate] <= 0:
            return None
        if tokens:
            speedup = metrics.measured_speedup(point.compressed, rate)
            if speedup is None:
                return None
            dense += tokens / point.dense[rate]
            compressed += tokens / point.dense[rate] / speedup
    return dense / compressed if compressed else None


def _measured_with(point: ReportedRun, setting: str) -> Any:
    """A setting of the throughput measurement, None if it is not known."""
    return point.compressed.get(metrics.metric(metrics.THROUGHPUT, setting))


def compare(study: Study) -> list[PaperComparison]:
    """Every pair of a measured and a reported number that may stand side by side."""
    if not any(_on_hub(section) for section in study.sections):
        return []
    known = literature()
    return [found for section in study.sections if _on_hub(section) for found in _compare_section(section, known)]


def _on_hub(section: Section) -> bool:
    return "/" in section.model and not section.model.startswith(("/", ".", "~"))


def _compare_section(section: Section, known: Literature) -> Iterator[PaperComparison]:
    reported = known.about(section.model)
    done = [point for point in section.points if point.completed]
    for row in reported:
        if row.method == DENSE and done and (value := measured_value(section.dense, row.metric)) is not None:
            yield PaperComparison(section, None, done[0], value, row, tuple(_differences(done[0], row, known, None)))
    for series in section.series:
        for point in series.completed:
            for row in reported:
                method = _method(series, point, row, known)
                value = measured_by(point, row.metric)
                if method is not None and value is not None:
                    found = tuple(_differences(point, row, known, method))
                    yield PaperComparison(section, series, point, value, row, found)


def _method(series: Series, point: ReportedRun, row: Reported, known: Literature) -> Method | None:
    if point.removed is None or abs(point.removed - row.removed) > 1e-6:
        return None
    if any(point.dials.get(key) != value for key, value in row.where.items()):
        return None
    for method in known.methods:
        if method.covers(row) and series.method in method.presets:
            updates, ours = method.options.get("update", ()), _option(point, "update")
            # A recovery that the paper's number lacks makes it another method, not another protocol.
            if ours is not None and updates and ours not in updates:
                continue
            there = _group_size(row, method, known)
            if there is None or there == group_size(point):
                return method
    return None


def _group_size(row: Reported, method: Method, known: Literature) -> int | None:
    if not method.shares:
        return 1
    found = row.group_size or known.protocols[row.protocol].get("group_size")
    return int(found) if found is not None else None


def group_size(point: ReportedRun) -> int | None:
    """Layers per basis: 1 where nothing is shared, None where types differ in it."""
    sharing = point.record.config.get("sharing", {})
    found = sharing.get("group_size", 1) if isinstance(sharing, Mapping) else 1
    if isinstance(found, Mapping):
        sizes = list(found.values())
        found = sizes[0] if sizes and all(size == sizes[0] for size in sizes) else None
    return found if isinstance(found, int) else None


def _option(point: ReportedRun, group: str) -> str | None:
    node = point.record.config.get(group)
    target = node.get("_target_") if isinstance(node, Mapping) else None
    return dials.option(target) if isinstance(target, str) else None


def _differences(point: ReportedRun, row: Reported, known: Literature, method: Method | None) -> Iterator[str]:
    """The known differences between the protocols of the measurement and of the reported number."""
    protocol = known.protocols[row.protocol]
    model = point.record.provenance.get("model", {})
    yield from _differ("dtype", model.get("dtype"), protocol.get("dtype"))
    if method is not None:
        yield from _recipe_differences(point, row, protocol, method)
    evaluation = point.record.config.get("evaluation")
    evaluation = evaluation if isinstance(evaluation, Mapping) else {}
    if metrics.is_perplexity(row.metric):
        names = {"sequence_length": "window length", "tail": "last, shorter window", "average": "mean over"}
        names["special_tokens"] = "BOS before the text"
        for key, name in names.items():
            yield from _differ(name, evaluation.get(key), protocol.get("perplexity", {}).get(key))
        if (windows := evaluation.get("max_windows")) is not None:
            yield f"perplexity of {windows} windows only"
    elif row.metric in (_PREFILL, _GENERATE):
        for key, name in _SPEED.items():
            yield from _differ(name, _measured_with(point, key), row.speed.get(key))
    elif row.metric == _SECONDS:
        gpus = ", ".join(str(gpu.get("name")) for gpu in point.record.hardware.get("gpus") or ())
        yield from _differ("hardware", gpus or None, row.hardware)
        if cost.used_cache(point):
            yield "some Grams or decompositions came from a cache here"
    else:
        yield from _differ("lm-eval", point.dense.get(metrics.LM_EVAL_VERSION), protocol.get("lm_eval"))
        if (limit := evaluation.get("limit")) is not None:
            yield f"the first {limit} items of each task only"
    yield from (f"reported: {note}" for note in (*protocol.get("notes", ()), *row.notes))


def _recipe_differences(
    point: ReportedRun, row: Reported, protocol: Mapping[str, Any], method: Method
) -> Iterator[str]:
    for group, options in method.options.items():
        if (ours := _option(point, group)) is not None and ours not in options:
            yield f"{group}: {ours} here, {' or '.join(options)} there"
    kept = point.record.size.get("retain_ratio")
    if formats.is_number(kept) and abs(kept - (1 - row.removed)) > _SAME_SHARE:
        yield f"{formats.share(round(kept, 3))} kept here, {formats.share(1 - row.removed)} asked for"
    windows = point.record.provenance.get("calibration", {})
    there = dict(protocol.get("calibration", {}))
    if row.calibration:
        there["corpus"] = row.calibration
    yield from _differ("calibration text", _corpus(point), there.get("corpus"))
    yield from _differ("calibration windows", windows.get("windows"), there.get("windows"))
    yield from _differ("calibration window length", windows.get("sequence_length"), there.get("sequence_length"))
    updates_from = protocol.get("updates_from")
    if (
        method.shares
        and updates_from is not None
        and row.removed >= updates_from
        and _option(point, "update") == "none"
    ):
        yield f"coefficients are updated there from {formats.share(updates_from)} removed on, not here"


def _corpus(point: ReportedRun) -> str | None:
    """The calibration text as the papers call it; by its option where they do not know it."""
    calibration = point.record.config.get("calibration")
    corpus = calibration.get("corpus") if isinstance(calibration, Mapping) else None
    if not isinstance(corpus, Mapping):
        return None
    words = " ".join(str(corpus.get(key, "")) for key in ("path", "name", "data_files")).lower()
    known = {"wikitext": "wikitext2", "/c4": "c4", "ptb": "ptb", "alpaca": "alpaca"}
    return next((name for sign, name in known.items() if sign in words), dials.option(str(corpus.get("_target_", "?"))))


def _differ(name: str, here: Any, there: Any) -> Iterator[str]:
    # Papers name a device in short: NVIDIA A100 is any of its kinds.
    if name in ("device", "hardware") and str(here).startswith(str(there)):
        return
    if here is not None and there is not None and str(here) != str(there):
        yield f"{name}: {formats.setting(here)} here, {formats.setting(there)} there"


def paper_tables(study: Study, comparisons: Sequence[PaperComparison]) -> Iterator[Table]:
    """Measured beside reported, and what else is reported at the same model, ratios and metrics."""
    if comparisons:
        yield _beside(comparisons)
    for i, section in enumerate(study.sections, start=1):
        if _on_hub(section):
            yield from _others(section, f"m{i}-reported")
    yield from _pairs(study)


def _beside(comparisons: Sequence[PaperComparison]) -> Table:
    # The dense model last: it shows what the protocols alone make of a number.
    comparisons = sorted(comparisons, key=lambda found: found.series is None)
    legend = list(dict.fromkeys(words for found in comparisons for words in found.differences))
    numbers = {words: i for i, words in enumerate(legend, start=1)}
    columns = (
        Column("model", numeric=False),
        RATIO,
        Column("metric", numeric=False),
        Column("method", numeric=False),
        Column("measured"),
        Column("reported"),
        Column("difference"),
        Column("differences of protocol", numeric=False),
        Column("source", numeric=False),
    )
    known = literature()
    rows = []
    for found in comparisons:
        reported, name = found.reported, _metric_name(found.reported.metric)
        relative = found.measured / reported.value - 1
        rows.append(
            Row(
                (
                    text(found.section.title),
                    ratio_cell(reported.removed, found.point.number),
                    text(name),
                    text(found.series.label if found.series else "dense"),
                    Cell(_show(reported.metric, found.measured), value=found.measured),
                    Cell(_show(reported.metric, reported.value), value=reported.value),
                    Cell(f"{100 * relative:+.1f} %", value=relative),
                    Cell(
                        ", ".join(str(n) for n in sorted(numbers[words] for words in found.differences))
                        or "none known",
                        value="; ".join(found.differences) or "none known",
                        hint="; ".join(found.differences),
                    ),
                    text(known.source(reported)),
                ),
                kind="dense" if found.series is None else "",
            )
        )
    note = "Only where model, ratio and metric agree. The numbered differences of protocol stand below the table."
    return Table("papers", "Measured beside reported", columns, tuple(rows), note=note, legend=tuple(legend))


def _others(section: Section, key: str) -> Iterator[Table]:
    """All numbers of papers at the measured ratios, with ours among them."""
    known = literature()
    rows_by_metric: dict[str, list[Reported]] = {}
    for row in known.about(section.model):
        asked = row.removed in section.ratios or row.method == DENSE
        if asked and metrics.kind_of(row.metric) != metrics.ACC:  # single tasks would be ten tables more
            rows_by_metric.setdefault(row.metric, []).append(row)
    for metric, reported in rows_by_metric.items():
        measured = [
            (
                series,
                {p.removed: value for p in series.completed if (value := measured_by(p, metric)) is not None},
            )
            for series in section.series
        ]
        if not any(values for _, values in measured):
            continue
        columns = [Column("method", numeric=False), Column("from", numeric=False)]
        columns += [Column(ratio_title(removed)) for removed in section.ratios]
        rows = []
        for series, values in measured:
            if values:
                cells = [_value(metric, values.get(removed)) for removed in section.ratios]
                rows.append(Row((text(series.label), text("measured"), *cells), kind="dense"))
        lines: dict[tuple[str, str], dict[float, float]] = {}
        for row in reported:
            if row.method != DENSE:
                lines.setdefault((row.name, known.source(row)), {})[row.removed] = row.value
        for (method, source), found in lines.items():
            cells = [_value(metric, found.get(removed)) for removed in section.ratios]
            rows.append(Row((text(method), text(source), *cells), kind="reported"))
        title = f"{formats.sentence(_metric_name(metric))} of {section.model}: measured, and all that is reported"
        note = "Reported under protocols that differ from paper to paper. Columns: share kept (removed)."
        yield Table(f"{key}-{metric.replace('/', '-')}", title, tuple(columns), tuple(rows), note=note)


def _pairs(study: Study) -> Iterator[Table]:
    """Loss of one basis for two layers as a share of one basis each, measured beside reported."""
    points = {point.folder: point for point in study.points}
    rows, sources = [], []
    for measured in study.pairs:
        point = points.get(measured.folder)
        if point is None or point.removed is None:
            continue
        model = model_name(point.record)
        for there in literature().pairs:
            here = measured.ratios.get(there.layers) if there.matrix == measured.matrix else None
            if here is None or model not in there.models or abs(point.removed - there.removed) > 1e-6:
                continue
            relative = here / there.ratio - 1
            cells = [text(model), ratio_cell(there.removed, point.number)]
            cells += [text(there.matrix), text(" and ".join(map(str, there.layers)))]
            cells += [Cell(f"{value:.3f}", value=value) for value in (here, there.ratio)]
            rows.append(Row((*cells, Cell(f"{100 * relative:+.1f} %", value=relative))))
            sources.append(f"{there.place}: {there.note}")
    if rows:
        columns = [Column("model", numeric=False), RATIO, Column("matrix", numeric=False)]
        columns += [Column("layers", hint="counted from 0"), Column("measured"), Column("reported")]
        yield Table(
            "papers-pairs",
            "Does sharing pay? Loss of one basis for two layers over one each",
            (*columns, Column("difference")),
            tuple(rows),
            note=f"Below 1, sharing pays. Reported: {'; '.join(dict.fromkeys(sources))}.",
        )


def _value(metric: str, value: float | None) -> Cell:
    return Cell(formats.ABSENT, style="muted") if value is None else Cell(_show(metric, value), value=value)


def _show(metric: str, value: float) -> str:
    if metric == _SECONDS:
        return formats.seconds(value)
    if metric in (_PREFILL, _GENERATE):
        return f"{value:.2f} x"
    return f"{value:.3f}" if metric in _MEANS else formats.metric(metric, value)


def _metric_name(metric: str) -> str:
    names = {
        _PREFILL: "speed on prompts against dense",
        _GENERATE: "speed of generating against dense",
        _SECONDS: "time of compressing",
    }
    if metric in _MEANS:
        return f"mean accuracy of {len(_MEANS[metric])} tasks"
    return names.get(metric) or metrics.title(metric)
