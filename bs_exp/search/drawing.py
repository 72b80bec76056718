"""Figures of a search: the front of several objectives, or how one objective fell from trial to trial."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, combinations
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from bs_exp.search.results import Results

FRONT, HISTORY = "front", "history"
# The numbers of more trials than these would lie on each other; the tables have them.
_LABELS = 12
# From here on as 10 k, 10 M and so on.
_LARGE = 1e4
_BLUE, _GREY = "#0072B2", "#9a9a9a"  # told apart in grey, and by readers who see no colours


def draw(results: Results, folder: Path) -> list[Path]:
    """Draws what a search found as PNG and SVG; nothing as long as no trial is completed."""
    if not results.completed:
        return []
    pairs = list(combinations(range(len(results.objectives)), 2)) or [(0, 0)]
    figure = Figure(figsize=(5.0 * len(pairs), 3.6), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, len(pairs), squeeze=False)[0]
    for ax, (x, y) in zip(axes, pairs, strict=True):
        if results.is_front:
            _front(ax, results, x, y)
        else:
            _history(ax, results)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    name = FRONT if results.is_front else HISTORY
    figure.suptitle(results.study, fontsize="medium")
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def _front(ax: Axes, results: Results, x: int, y: int) -> None:
    best = {point.number for point in results.best}
    others = [point.values for point in results.completed if point.number not in best]
    front = [point.values for point in results.best]
    ax.scatter([v[x] for v in others], [v[y] for v in others], s=18, color=_GREY, label="dominated")
    # Two objectives make a line; with more, neighbours on one pair of axes are none on the others.
    style = "-" if len(results.objectives) == 2 else ""
    ax.plot([v[x] for v in front], [v[y] for v in front], "o", ls=style, color=_BLUE, ms=5, lw=1, label="Pareto front")
    for point in results.best if len(front) <= _LABELS else ():
        ax.annotate(
            str(point.number), (point.values[x], point.values[y]), (3, 3), textcoords="offset points", fontsize=7
        )
    for axis, i in ((ax.xaxis, x), (ax.yaxis, y)):
        axis.set_label_text(_label(results, i))
        if max(abs(point.values[i]) for point in results.completed) >= _LARGE:
            axis.set_major_formatter(EngFormatter(sep=" "))
    ax.legend(frameon=False, fontsize="small")


def _history(ax: Axes, results: Results) -> None:
    numbers = [point.number for point in results.completed]
    values = [point.values[0] for point in results.completed]
    best = list(accumulate(values, max if results.directions[0] == "maximize" else min))
    ax.scatter(numbers, values, s=18, color=_GREY, label="trial")
    ax.step(numbers, best, where="post", color=_BLUE, label="best so far")
    for point in results.failed:
        ax.axvline(point.number, color=_GREY, lw=0.8, ls=":", label="_failed")
    ax.xaxis.set_label_text("trial")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_label_text(_label(results, 0))
    ax.legend(frameon=False, fontsize="small")


def _label(results: Results, objective: int) -> str:
    return f"{results.objectives[objective]} ({results.directions[objective]})"
