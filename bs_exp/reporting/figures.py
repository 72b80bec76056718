"""The figures of a study, made from records alone, each with a description in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bs_exp.printable import printable
from bs_exp.records import metrics
from bs_exp.records.pairs import PairTable
from bs_exp.reporting import cost, drawing, formats, ranks
from bs_exp.reporting.drawing import Drawn, Hover
from bs_exp.reporting.results import MOST_HEADLINES, ratio_title
from bs_exp.reporting.study import ReportedRun, Section, Series, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More lines than this cannot be told apart: then a colour is a method, and its dials are not named.
_MOST_SERIES = 12
_MOST_PANELS = 12
_MOST_MATRICES = 64
_MOST_PAIRS = 8
_MOST_PHASES = 16
# Letters of a legend: laying out text takes Matplotlib seconds per 10,000 of them.
_LONGEST_LABEL = 120


@dataclass(frozen=True)
class Look:
    """Colour, marker and dashes of a series; only one series of each look has a label."""

    label: str | None
    colour: str
    marker: str
    dashes: str

    def line(self) -> dict[str, Any]:
        return {"color": self.colour, "marker": self.marker, "linestyle": self.dashes, "label": self.label}

    def dots(self) -> dict[str, Any]:
        return {"color": self.colour, "marker": self.marker, "linestyle": "none", "label": self.label}


def looks(section: Section) -> dict[Series, Look]:
    """The same look for a series in every figure of a section."""
    single = len(section.series) <= _MOST_SERIES
    labels = list(dict.fromkeys(series.label if single else series.method for series in section.series))
    found: dict[Series, Look] = {}
    named: set[str] = set()
    for series in section.series:
        label = series.label if single else series.method
        i = labels.index(label)
        shown = None if label in named else formats.short(label, _LONGEST_LABEL)
        if series.completed:
            named.add(label)
        found[series] = Look(shown, drawing.colour(i), drawing.marker(i), drawing.dashes(i))
    return found


def _colours(section: Section) -> str:
    many = len(section.series) > _MOST_SERIES
    return f" {len(section.series)} series, in the colour of their method." if many else ""


def section_figures(section: Section, key: str) -> Iterator[Drawn]:
    """Curves, Pareto fronts, speed, time and ranks of one model."""
    if not any(series.completed for series in section.series):
        return
    styles = looks(section)
    ratios = {point.removed for series in section.series for point in series.completed}
    for name in metrics.headlines(section.quality, section.main_metric)[:MOST_HEADLINES]:
        if len(ratios) > 1:  # no curve through one point
            yield from _curve(section, name, styles, f"{key}-curve-{formats.file_key(name)}")
    if section.main_metric is not None:
        yield from _pareto_size(section, section.main_metric, styles, f"{key}-pareto-size")
        for i, entries in enumerate(cost.speed_settings(section).items(), start=1):
            yield from _pareto_speed(section, section.main_metric, *entries, styles, f"{key}-pareto-speed-{i}")
    for i, (setting, measured) in enumerate(cost.speed_settings(section).items(), start=1):
        if len({point.removed for _, point in measured}) < 2:
            continue
        yield _speed(setting, measured, styles, f"{key}-speed-{i}")
    yield from _timings(section, f"{key}-timings")
    yield from _ranks(section, f"{key}-ranks")


def study_figures(study: Study) -> dict[Section, list[Drawn]]:
    """All figures, by section."""
    with drawing.house_style():
        return {section: list(section_figures(section, f"m{i}")) for i, section in enumerate(study.sections, start=1)}


def pair_figures(pairs: Sequence[PairTable]) -> list[Drawn]:
    """Heat maps that say for which pairs of layers sharing pays, apart for each run."""
    runs: dict[Path, list[PairTable]] = {}
    for table in pairs:
        runs.setdefault(table.folder, []).append(table)
    parts = [
        (formats.short(printable(folder.name)) if len(runs) > 1 else "", tables[i : i + _MOST_PAIRS])
        for folder, tables in runs.items()
        for i in range(0, len(tables), _MOST_PAIRS)
    ]
    if not parts:
        return []
    with drawing.house_style():
        return [_pairs(tables, run, f"sharing-{i}") for i, (run, tables) in enumerate(parts, start=1)]


def pareto_front(points: Sequence[tuple[float, float]], *, second_lower: bool) -> list[int]:
    """Indices of the points that no other beats in both coordinates, by the first, of which less is better."""
    sign = 1 if second_lower else -1
    front: list[int] = []
    best = math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        if sign * points[i][1] < best:
            best = sign * points[i][1]
            front.append(i)
    return front


def _title(name: str) -> str:
    return formats.short(metrics.title(name), _LONGEST_LABEL)


def _axes(figure: Figure, x: str, y: str) -> Axes:
    axes = figure.add_axes((0.125, 0.165, 0.845, 0.79))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def _curve(section: Section, name: str, styles: dict[Series, Look], key: str) -> Iterator[Drawn]:
    figure = drawing.canvas()
    axes = _axes(figure, "parameters kept (%)", _title(name))
    axes.invert_xaxis()  # the smaller model on the right
    values: list[float] = []
    hovers: list[Hover] = []
    for series, look in styles.items():
        points = [p for p in series.completed if formats.is_number(p.compressed.get(name))]
        if not points:
            continue
        heights = [float(p.compressed[name]) for p in points]
        values += heights
        axes.plot([100 * (p.ratio or 0) for p in points], heights, **look.line())
        hovers += [_hover(axes, series, p, name, 100 * (p.ratio or 0)) for p in points]
    if not values:
        return
    if formats.is_number(dense := section.dense.get(name)):
        axes.axhline(dense, color=drawing.INK, linewidth=1, linestyle=(0, (4, 3)), label="dense")
        values.append(float(dense))
    log = drawing.nice_log(axes, values) if metrics.lower_is_better(name) else False
    _tick_ratios(axes, section.points)
    drawing.legend_below(figure, axes)
    yield drawing.render(
        figure,
        key,
        f"{formats.sentence(metrics.title(name))} by share kept",
        f"{'Logarithmic scale. ' if log else ''}The dashed line is the dense model.{_colours(section)}",
        _curve_alt(section, name),
        hovers=hovers,
    )


def _tick_ratios(axes: Axes, points: Sequence[ReportedRun]) -> None:
    """Names the ratios that were measured, if they are few and far enough apart, in place of round numbers."""
    found = sorted({round(100 * point.ratio, 6) for point in points if point.ratio is not None})
    gaps = [b - a for a, b in pairwise(found)]
    if gaps and min(gaps) >= (found[-1] - found[0]) / 10:
        axes.set_xticks(found, [f"{ratio:g}" for ratio in found])


def _hover(axes: Axes, series: Series, point: ReportedRun, name: str, x: float, more: str = "") -> Hover:
    """What a point says: method, ratio, the metric and its change."""
    value = point.compressed[name]
    ratio = f" at {ratio_title(point.removed)}" if point.removed is not None else ""
    change = formats.change(value, point.dense.get(name))
    words = [f"{formats.short(series.label, _LONGEST_LABEL)}{ratio}: {formats.metric(name, value)}"]
    words += [f"{change} against dense"] if change else []
    words += [f"{formats.percent(point.kept)} kept"] if point.kept is not None else []
    return Hover(axes, x, float(value), ", ".join([*words, *([more] if more else [])]))


def _curve_alt(section: Section, name: str) -> str:
    words = [f"Line chart: {metrics.title(name)} of {len(section.series)} series at {len(section.ratios)} ratios."]
    for removed in (section.ratios[0], section.ratios[-1]):
        if best := section.best(removed, name):
            value = formats.metric(name, best.by_removed[removed].compressed[name])
            words.append(f"Best at {ratio_title(removed)}: {best.label}, {value}.")
    return " ".join(words)


def _pareto_size(section: Section, name: str, styles: dict[Series, Look], key: str) -> Iterator[Drawn]:
    entries = [
        (series, point, float(point.record.size["bytes"]))
        for series in section.series
        for point in series.completed
        if formats.is_number(point.compressed.get(name)) and formats.is_number(point.record.size.get("bytes"))
    ]
    if entries:
        unit = 1024**2 if max(size for _, _, size in entries) < 2 * 1024**3 else 1024**3
        label = "size (MiB)" if unit == 1024**2 else "size (GiB)"
        dense = next((p.record.size.get("dense_bytes") for _, p, _ in entries), None)
        scaled = [(series, point, size / unit) for series, point, size in entries]
        yield _front(
            section, name, scaled, styles, key, label, "bytes", dense / unit if formats.is_number(dense) else None
        )


def _pareto_speed(
    section: Section,
    name: str,
    setting: cost.SpeedSetting,
    measured: Sequence[tuple[Series, ReportedRun]],
    styles: dict[Series, Look],
    key: str,
) -> Iterator[Drawn]:
    # Negative: for the front, less of the first coordinate is better.
    entries = [
        (series, point, -float(point.compressed[metrics.DECODE]))
        for series, point in measured
        if formats.is_number(point.compressed.get(name)) and formats.is_number(point.compressed.get(metrics.DECODE))
    ]
    if entries:
        speed = entries[0][1].dense.get(metrics.DECODE)
        dense = -speed if formats.is_number(speed) else None
        yield _front(section, name, entries, styles, key, "decoding (tokens/s)", setting.label, dense)


def _front(
    section: Section,
    name: str,
    entries: Sequence[tuple[Series, ReportedRun, float]],
    styles: dict[Series, Look],
    key: str,
    label: str,
    what: str,
    dense: float | None,
) -> Drawn:
    """Quality against a cost; costs below 0 are speeds."""
    lower = metrics.lower_is_better(name)
    coordinates = [(cost, float(point.compressed[name])) for _, point, cost in entries]
    front = pareto_front(coordinates, second_lower=lower)
    figure = drawing.canvas()
    axes = _axes(figure, label, _title(name))
    axes.plot(
        [abs(coordinates[i][0]) for i in front],
        [coordinates[i][1] for i in front],
        color=drawing.FAINT,
        linewidth=5,
        solid_capstyle="round",
        zorder=1,
        label="Pareto front",
    )
    for series, look in styles.items():
        mine = [(abs(cost), float(point.compressed[name])) for other, point, cost in entries if other is series]
        if mine:
            axes.plot(*zip(*mine, strict=True), **look.dots(), zorder=3)
    values = [value for _, value in coordinates]
    if dense is not None and formats.is_number(quality := section.dense.get(name)):
        axes.plot(
            [abs(dense)], [quality], marker="*", markersize=10, color=drawing.INK, linestyle="none", label="dense"
        )
        values.append(float(quality))
    if lower:
        drawing.nice_log(axes, values)
    drawing.legend_below(figure, axes)
    hovers = [
        _hover(axes, series, point, name, abs(cost), f"{abs(cost):,.4g} {label}") for series, point, cost in entries
    ]
    members = [f"{entries[i][0].label} at {ratio_title(entries[i][1].removed or 0)}" for i in front]
    speed = "tokens/s" in label
    title = f"{formats.sentence(metrics.title(name))} against {'speed' if speed else 'size'}"
    direction = "right and low" if speed else "left and low"
    if not lower:
        direction = direction.replace("low", "high")
    caption = f"Best is {direction}. " + (f"{what}." if speed else "Stored bytes of the model's tensors.")
    caption += _colours(section)
    alt = f"Scatter chart: {metrics.title(name)} against {label} of {len(entries)} models. On the Pareto front: "
    return drawing.render(figure, key, title, caption, alt + "; ".join(members[:8]) + ".", hovers=hovers)


def _speed(
    setting: cost.SpeedSetting, measured: Sequence[tuple[Series, ReportedRun]], styles: dict[Series, Look], key: str
) -> Drawn:
    figure = drawing.canvas(height=4.2)
    names = ((metrics.PREFILL, "prefill"), (metrics.DECODE, "decoding"))
    words: list[str] = []
    hovers: list[Hover] = []
    for i, (name, title) in enumerate(names):
        axes = figure.add_axes((0.125, 0.58 - 0.43 * i, 0.845, 0.36))
        axes.set_ylabel(f"{title} (dense = 1)")
        axes.axhline(1, color=drawing.INK, linewidth=1, linestyle=(0, (4, 3)), label="dense")
        axes.invert_xaxis()
        for series, look in styles.items():
            points = [
                point
                for other, point in measured
                if other is series and _positive(point.compressed.get(name + metrics.SPEEDUP))
            ]
            mine = [(100 * (point.ratio or 0), point.compressed[name + metrics.SPEEDUP]) for point in points]
            if mine:
                axes.plot(*zip(*mine, strict=True), **look.line())
                words.append(f"{series.label} {title} {min(y for _, y in mine):.2f} to {max(y for _, y in mine):.2f}")
                told = (_speed_words(series, point, name, title) for point in points)
                hovers += [Hover(axes, x, y, text) for (x, y), text in zip(mine, told, strict=True)]
        _tick_ratios(axes, [point for _, point in measured])
        if i == 0:
            axes.tick_params(labelbottom=False)
    axes.set_xlabel("parameters kept (%)")
    drawing.legend_below(figure, axes)
    alt = f"Line charts: throughput relative to the dense model by share kept. {'; '.join(words[:8])}."
    title, caption = "Throughput against the dense model", f"Above 1 is faster. {setting.label}."
    return drawing.render(figure, key, title, caption, alt, hovers=hovers)


def _speed_words(series: Series, point: ReportedRun, name: str, title: str) -> str:
    """What a point says: method, ratio, rate, and the ratio of speeds with its 95 % interval."""
    found = point.compressed
    low, high = found.get(name + metrics.SPEEDUP_LOW), found.get(name + metrics.SPEEDUP_HIGH)
    words = f"{formats.short(series.label, _LONGEST_LABEL)} at {ratio_title(point.removed or 0)}: {title} "
    words += f"{found[name + metrics.SPEEDUP]:.3f} times the dense speed"
    if _positive(low) and _positive(high):
        words += f" ({low:.3f} to {high:.3f})"
    if metrics.measured_speedup(found, name) is None:
        words += f", {metrics.NO_DIFFERENCE}"
    return words + (f", {formats.number(found[name])} tokens/s" if formats.is_number(found.get(name)) else "")


def _positive(value: Any) -> bool:
    return formats.is_number(value) and value > 0


def _timings(section: Section, key: str) -> Iterator[Drawn]:
    done = [cost.phases(point) for series in section.series for point in series.completed]
    total = sum(sum(spent.values()) for spent in done)
    # What takes less than a thousandth of the time cannot be seen.
    names = [
        n for n in dict.fromkeys(n for spent in done for n in spent) if sum(s.get(n, 0.0) for s in done) > total / 1000
    ]
    if not names:
        return
    names = _longest(names, done)
    entries = [(series, _mean_phases(series, names)) for series in section.series if series.completed]
    entries = sorted(entries, key=lambda entry: sum(entry[1]))[-_MOST_SERIES:]
    figure = drawing.canvas(height=1.0 + 0.26 * len(entries))
    height = figure.get_size_inches()[1]
    longest = max(len(series.label) for series, _ in entries)
    left = min(0.45, 0.03 + 0.0135 * longest)
    axes = figure.add_axes((left, 0.5 / height, 0.97 - left, 1 - 0.6 / height))
    starts = [0.0] * len(entries)
    for i, name in enumerate(names):
        widths = [spent[i] for _, spent in entries]
        style: dict[str, Any] = {"color": drawing.colour(i), "label": formats.short(name, _LONGEST_LABEL)}
        style["hatch"] = None if i < len(drawing.COLOURS) else "////"
        axes.barh(
            range(len(entries)), widths, left=starts, height=0.68, edgecolor=drawing.PAPER, linewidth=0.6, **style
        )
        starts = [a + b for a, b in zip(starts, widths, strict=True)]
    axes.set_yticks(range(len(entries)), [formats.short(series.label) for series, _ in entries])
    axes.set_ylim(-0.6, len(entries) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds per run, mean over its ratios")
    drawing.legend_below(figure, axes)
    top = sorted(
        zip(names, (sum(spent[i] for _, spent in entries) for i in range(len(names))), strict=True), key=lambda x: -x[1]
    )
    alt = f"Bar chart: seconds per phase of {len(entries)} series; most goes to "
    yield drawing.render(
        figure,
        key,
        "Where the time goes",
        "Work taken from a cache, or done by an earlier point of the sweep, costs nothing here.",
        alt + ", ".join(name for name, _ in top[:3]) + ".",
    )


def _longest(names: Sequence[str], spent: Sequence[Mapping[str, float]]) -> list[str]:
    """The phases that take most of the time, as many as can be told apart, in the order they had."""
    longest = sorted(names, key=lambda name: -sum(phases.get(name, 0.0) for phases in spent))[:_MOST_PHASES]
    return [name for name in names if name in longest]


def _mean_phases(series: Series, names: Sequence[str]) -> list[float]:
    done = [cost.phases(point) for point in series.completed]
    return [sum(spent.get(name, 0.0) for spent in done) / len(done) for name in names]


def _ranks(section: Section, key: str) -> Iterator[Drawn]:
    from matplotlib import colormaps

    entries = ranks.rank_points(section)
    if not entries:
        return
    shown = entries[:_MOST_PANELS]
    tables = [ranks.places(point) for _, point in shown]
    matrices = [list(dict.fromkeys(matrix for matrix, _ in table))[:_MOST_MATRICES] for table in tables]
    most = max(map(len, matrices))
    layers = sorted({layer for table in tables for _, layer in table})
    columns = 2 if len(shown) in (2, 4) else min(3, len(shown))
    rows = -(-len(shown) // columns)
    width = max(drawing.WIDTH, 3.1 * columns)
    height = rows * (0.42 + 0.16 * most) + 0.75
    figure = drawing.canvas(width, height)
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=0.42 / width,
        right=1 - 0.1 / width,
        top=1 - 0.28 / height,
        bottom=0.85 / height,
        hspace=0.42 / (0.16 * most),  # between panels of that height
        wspace=0.24,
    )
    colours = colormaps[drawing.SEQUENTIAL].with_extremes(bad="none")
    image = None
    for i, ((series, _), table) in enumerate(zip(shown, tables, strict=True)):
        axes = grid[i // columns][i % columns]
        own = matrices[i]
        values = [[_kept(table.get((matrix, layer))) for layer in layers] for matrix in own]
        image = axes.imshow(values, aspect="auto", interpolation="nearest", vmin=0, vmax=1, cmap=colours)
        axes.set_title(formats.short(series.label), loc="left", pad=3)
        axes.set_yticks(range(len(own)), [formats.short(matrix) for matrix in own])
        step = max(1, -(-len(layers) // 8))
        axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axes.grid(visible=False)
    for i in range(len(shown), rows * columns):
        grid[i // columns][i % columns].set_visible(False)
    assert image is not None
    bar = figure.add_axes((0.42 / width, 0.42 / height, 1 - 0.52 / width, 0.1 / height))
    figure.colorbar(image, cax=bar, orientation="horizontal")
    bar.set_xlabel("share of the parameters kept; layers from left to right", labelpad=2)
    bar.set_title("")
    removed = ratio_title(shown[0][1].removed or 0)
    left_out = f" {len(entries) - len(shown)} more series are in the table." if len(entries) > len(shown) else ""
    yield drawing.render(
        figure,
        key,
        f"Who keeps how much, at {removed}",
        f"Share of every matrix' parameters that its rank keeps; 1 is dense. Ranks are in the table.{left_out}",
        f"Heat maps by matrix type and layer for {len(shown)} series, at {removed}. "
        + " ".join(_range(*entry) for entry in zip(shown, tables, strict=True)),
        wide=True,
    )


def _kept(place: ranks.Place | None) -> float:
    return math.nan if place is None else place.kept


def _range(entry: tuple[Series, ReportedRun], table: dict[tuple[str, int], ranks.Place]) -> str:
    kept = [place.kept for place in table.values() if formats.is_number(place.kept)]
    return f"{entry[0].label}: {min(kept):.2f} to {max(kept):.2f}." if kept else f"{entry[0].label}: unknown."


def _pairs(tables: Sequence[PairTable], run: str, key: str) -> Drawn:
    from matplotlib import colormaps

    columns = min(4, len(tables))
    rows = -(-len(tables) // columns)
    width, height = max(drawing.WIDTH, 2.4 * columns), 2.5 * rows + 0.5
    figure = drawing.canvas(width, height)
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=0.4 / width, right=1 - 0.1 / width, top=1 - 0.3 / height, bottom=0.8 / height, hspace=0.35, wspace=0.25
    )
    known = [abs(value) for table in tables for row in table.values for value in row if formats.is_number(value)]
    limit = max(known, default=0.0) or 1.0
    colours = colormaps[drawing.DIVERGING].with_extremes(bad="none")
    image = None
    words = []
    for i, table in enumerate(tables):
        axes = grid[i // columns][i % columns]
        values = [[math.nan if value is None else value for value in row] for row in table.values]
        image = axes.imshow(values, interpolation="nearest", vmin=-limit, vmax=limit, cmap=colours)
        axes.set_title(formats.short(table.matrix), loc="left", pad=3)
        step = max(1, -(-len(table.layers) // 8))
        ticks, names = range(0, len(table.layers), step), [str(layer) for layer in table.layers[::step]]
        axes.set_xticks(ticks, names)
        axes.set_yticks(ticks, names)
        axes.grid(visible=False)
        pairs = [v for i, row in enumerate(values) for j, v in enumerate(row) if i != j and not math.isnan(v)]
        words.append(f"{table.matrix}: sharing pays for {sum(v < 0 for v in pairs)} of {len(pairs)} entries")
    for i in range(len(tables), rows * columns):
        grid[i // columns][i % columns].set_visible(False)
    assert image is not None
    bar = figure.add_axes((0.4 / width, 0.42 / height, 1 - 0.5 / width, 0.1 / height))
    figure.colorbar(image, cax=bar, orientation="horizontal")
    unit = f" ({formats.short(tables[0].unit)})" if tables[0].unit else ""
    bar.set_xlabel(f"loss with a shared basis minus loss apart{unit}", labelpad=2)
    return drawing.render(
        figure,
        key,
        "Does sharing pay?" + (f" Run {run}" if run else ""),
        "One basis for two layers against one each, at the same parameters. Below zero, sharing loses less.",
        f"Heat maps of layer pairs. {'; '.join(words)}.",
        wide=True,
    )
