"""How figures look: one palette, light for files, and colours of the page where they stand in it.

Matplotlib is imported where it is used: the command line and its help must not wait for it.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by every kind of colour vision; the light ones darkened until they stand out
# on white (3 to 1). On a dark page its style sheet gives each of them a lighter twin: --c0, --c1, ...
COLOURS = ("#0072b2", "#d55e00", "#00805d", "#b8568f", "#a86f00", "#2f8fc4", "#6b5fb5", "#7a7a00")
# Colour is never the only difference.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")
INK, FAINT, PAPER = "#1f2329", "#c9ced6", "#ffffff"
SEQUENTIAL, DIVERGING = "cividis", "PuOr_r"
WIDTH, HEIGHT = 4.8, 3.3
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.titlesize": 9.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "text.parse_math": False,  # a name may hold a dollar sign
    "svg.fonttype": "none",  # letters stay letters: they can be searched, and follow the page's font
    "svg.hashsalt": "bs_exp",
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
}
_PNG_DPI, _IMAGE_DPI = 150, 96
_POINTS_PER_INCH, _HIT_RADIUS = 72, 5
_MOST_HOVERS = 1000


@dataclass(frozen=True)
class Drawn:
    """A figure as files and for the page. `alt` says in words what it shows; `wide` takes the page's width."""

    key: str
    title: str
    caption: str
    alt: str
    svg: str
    png: bytes
    inline: str
    wide: bool = False


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib settings of all figures."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # Names may hold letters that the PNG's font lacks; the SVG has them, and so has the page.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        yield


def canvas(width: float = WIDTH, height: float = HEIGHT) -> Figure:
    """An empty figure of a size in inches, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def marker(i: int) -> str:
    return MARKERS[i % len(MARKERS)]


def dashes(i: int) -> str:
    """A line style; it changes when the colours begin again."""
    return DASHES[i // len(COLOURS) % len(DASHES)]


def legend_below(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """The legend under the axes, with room for it."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    columns = 1 if max(map(len, labels)) > 34 else min(columns, len(handles))
    space = 0.2 * -(-len(handles) // columns)
    _grow(figure, space)
    figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.03, 0.0), ncols=columns, borderaxespad=0.2)


def _grow(figure: Figure, space: float) -> None:
    """Adds room below, in inches; the axes keep their size."""
    width, height = figure.get_size_inches()
    taller = height + space
    figure.set_size_inches(width, taller)
    for axes in figure.axes:
        place = axes.get_position()
        axes.set_position((place.x0, (place.y0 * height + space) / taller, place.width, place.height * height / taller))


@dataclass(frozen=True)
class Hover:
    """What a point of a figure says on the page when a pointer is over it; `x` and `y` are values of its axes."""

    axes: Axes
    x: float
    y: float
    text: str


def render(
    figure: Figure, key: str, title: str, caption: str, alt: str, *, wide: bool = False, hovers: Sequence[Hover] = ()
) -> Drawn:
    """The figure as SVG, PNG and inline SVG; `hovers` are on the page alone."""
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=_PNG_DPI, metadata={"Title": title, "Description": alt, "Software": None})
    figure.savefig(svg, format="svg", dpi=_IMAGE_DPI, metadata={"Title": title, "Date": None, "Creator": None})
    text = svg.getvalue()
    inline = _inline(text, key, alt).removesuffix("\n").removesuffix("</svg>")
    inline += "".join(_hit(figure, hover) for hover in hovers[:_MOST_HOVERS]) + "</svg>\n"
    return Drawn(key, title, caption, alt, text, png.getvalue(), inline, wide)


def _hit(figure: Figure, hover: Hover) -> str:
    """A circle that cannot be seen, with a title, over a point of the figure."""
    x, y = hover.axes.transData.transform((hover.x, hover.y)) * _POINTS_PER_INCH / figure.dpi
    height = figure.get_size_inches()[1] * _POINTS_PER_INCH
    words = _attribute(hover.text)
    return f'<circle class="hit" cx="{x:.1f}" cy="{height - y:.1f}" r="{_HIT_RADIUS}"><title>{words}</title></circle>'


def _inline(svg: str, key: str, alt: str) -> str:
    """The SVG as a part of the page: without its own background, in the colours of the reader's scheme."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    # Names within a figure are those of every other figure too.
    body = re.sub(r'\bid="', f'id="{key}-', body)
    body = re.sub(r'"#(?=[A-Za-z_])', f'"#{key}-', body)
    body = re.sub(r"url\(#", f"url(#{key}-", body)
    for i, name in enumerate(COLOURS):
        body = body.replace(name, f"var(--c{i})")
    body = body.replace(INK, "currentColor").replace(FAINT, "var(--grid)").replace(PAPER, "transparent")
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', body)
    assert size is not None
    head = (
        f'<svg class="plot" role="img" aria-label="{_attribute(alt)}" viewBox="{size[0][9:-1]}" style="--w:{size[1]}"'
    )
    head += ' xmlns:xlink="http://www.w3.org/1999/xlink">'
    return head + body[body.index(">") + 1 :]


def _attribute(words: str) -> str:
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        words = words.replace(sign, entity)
    return words


def nice_log(axes: Axes, values: Sequence[float]) -> bool:
    """A logarithmic axis where values lie far apart; whether it was set."""
    from matplotlib.ticker import LogFormatter, LogLocator, NullFormatter

    if min(values) <= 0 or max(values) / min(values) < 4:
        return False
    axes.set_yscale("log")
    wide = max(values) / min(values) > 100
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(9, 9)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    return True
