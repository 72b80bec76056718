"""Figures of a search: the front of several objectives, pair by pair, or one objective from trial to trial.

Optuna's own plots set a style for all later figures, and draw three objectives only in space.
"""

from __future__ import annotations

import io
from itertools import accumulate, combinations
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from bs_exp.search.folder import write_files
from bs_exp.search.results import Results

_LABELS = 12  # The numbers of more trials would overlap.
_LARGE = 1e4  # From here on as 10 k, 10 M and so on.
_BLUE, _GREY = "#0072B2", "#9a9a9a"  # Distinct in grey, and for colour-blind readers.


def draw(results: Results, folder: Path) -> list[Path]:
    """Draws the results as front.png and .svg, or history.png and .svg; nothing if no trial is completed.

    Raises SearchError if they cannot be written.
    """
    if not results.completed:
        return []
    pairs = list(combinations(range(len(results.objectives)), 2)) or [(0, 0)]
    figure = Figure(figsize=(5.0 * len(pairs), 3.6), layout="constrained")
    for ax, (x, y) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        if results.is_front:
            _front(ax, results, x, y)
        else:
            _history(ax, results)
        ax.yaxis.set_label_text(_label(results, y))
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize="small")
    figure.suptitle(results.study, fontsize="medium")
    name = "front" if results.is_front else "history"
    files: dict[str, bytes] = {}
    for kind in ("png", "svg"):
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=150)
        files[f"{name}.{kind}"] = file.getvalue()
    write_files(folder, files)
    return [folder / file for file in files]


def _front(ax: Axes, results: Results, x: int, y: int) -> None:
    def places(values: list[tuple[float, ...]]) -> tuple[list[float], list[float]]:
        return [v[x] for v in values], [v[y] for v in values]

    best = {point.number for point in results.best}
    others = [point.values for point in results.completed if point.number not in best]
    ax.scatter(*places(others), s=18, color=_GREY, label="dominated")
    # Two objectives make a line; with more, neighbours on one pair of axes are none on the others.
    style = "-" if len(results.objectives) == 2 else ""
    front = places([point.values for point in results.best])
    ax.plot(*front, "o", ls=style, color=_BLUE, ms=5, lw=1, label="Pareto front")
    for point in results.best if len(results.best) <= _LABELS else ():
        place = point.values[x], point.values[y]
        ax.annotate(str(point.number), place, (3, 3), textcoords="offset points", fontsize=7)
    for axis, i in ((ax.xaxis, x), (ax.yaxis, y)):
        if max(abs(point.values[i]) for point in results.completed) >= _LARGE:
            axis.set_major_formatter(EngFormatter(sep=" "))
    ax.xaxis.set_label_text(_label(results, x))


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


def _label(results: Results, objective: int) -> str:
    return f"{results.objectives[objective]} ({results.directions[objective]})"
