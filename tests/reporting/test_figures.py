"""Figures come from records alone, say in words what they show, and fit into the page."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bs_exp.records.pairs import PairTable
from bs_exp.records.record import RunRecord
from bs_exp.reporting import drawing
from bs_exp.reporting.collect import Collection, Found
from bs_exp.reporting.drawing import Drawn
from bs_exp.reporting.figures import pair_figures, pareto_front, study_figures
from bs_exp.reporting.study import arrange
from tests.support import synthetic

_NAME = 'a$b <i>&"c"'


def _drawn(*records: RunRecord) -> dict[str, Drawn]:
    found = tuple(Found(record, Path(f"runs/{i}")) for i, record in enumerate(records))
    figures = study_figures(arrange(Collection(found, (), (), ())))
    return {figure.key: figure for drawn in figures.values() for figure in drawn}


@pytest.fixture(scope="module")
def drawn() -> dict[str, Drawn]:
    records = [synthetic.record(m, r, group_size=1) for m in ("svd_llm", "best") for r in (0.2, 0.5)]
    return _drawn(*records, synthetic.record(_NAME, 0.5, group_size=1))


def test_every_question_has_its_figure(drawn: dict[str, Drawn]) -> None:
    assert list(drawn) == [
        "m1-curve-ppl-wikitext2",
        "m1-curve-ppl-ptb",
        "m1-curve-acc-mean",
        "m1-pareto-size",
        "m1-pareto-speed-1",
        "m1-speed-1",
        "m1-timings",
        "m1-ranks",
    ]


def test_files_are_whole_and_the_same_every_time(drawn: dict[str, Drawn]) -> None:
    for figure in drawn.values():
        assert figure.png.startswith(b"\x89PNG")
        ElementTree.fromstring(figure.svg)
        ElementTree.fromstring(figure.inline)
    again = _drawn(*[synthetic.record("svd_llm", r) for r in (0.2, 0.5)])
    once = _drawn(*[synthetic.record("svd_llm", r) for r in (0.2, 0.5)])
    assert {key: figure.svg for key, figure in again.items()} == {key: figure.svg for key, figure in once.items()}


def test_names_are_shown_as_they_are(drawn: dict[str, Drawn]) -> None:
    figure = drawn["m1-curve-ppl-wikitext2"]
    texts = [
        "".join(node.itertext()) for node in ElementTree.fromstring(figure.svg).iter() if node.tag.endswith("text")
    ]
    assert _NAME in texts
    assert "<i>" not in figure.inline


def test_every_figure_says_what_it_shows(drawn: dict[str, Drawn]) -> None:
    assert "Best at 50 % (\u221250 %): best" in drawn["m1-curve-ppl-wikitext2"].alt
    for figure in drawn.values():
        assert len(figure.alt) > 40
        root = ElementTree.fromstring(figure.inline)
        assert (root.get("role"), root.get("aria-label")) == ("img", figure.alt)


def test_on_the_page_colours_are_the_pages(drawn: dict[str, Drawn]) -> None:
    for figure in drawn.values():
        for colour in (*drawing.COLOURS, drawing.INK, drawing.FAINT, drawing.PAPER):
            assert colour not in figure.inline
        assert "currentColor" in figure.inline
        assert "<style" not in figure.inline  # it would hold for the whole page
        assert f"fill: {drawing.PAPER}" in figure.svg  # a file can be read on any ground


def test_names_within_figures_do_not_meet(drawn: dict[str, Drawn]) -> None:
    names = [name for figure in drawn.values() for name in re.findall(r'\bid="([^"]+)"', figure.inline)]
    assert len(names) == len(set(names))
    for figure in drawn.values():
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', figure.inline))
        assert used <= set(re.findall(r'\bid="([^"]+)"', figure.inline))


def test_failed_points_are_no_figure() -> None:
    from bs_exp.records.record import Status

    assert _drawn(synthetic.record(status=Status.FAILED)) == {}


def test_one_point_has_figures_too() -> None:
    assert "m1-curve-ppl-wikitext2" not in _drawn(synthetic.record())  # no curve through one point
    assert "m1-pareto-size" in _drawn(synthetic.record())


def test_infinite_perplexity_does_not_stop_the_others() -> None:
    found = _drawn(synthetic.record("svd", 0.2, ppl=float("inf")), synthetic.record("svd", 0.5, ppl=100.0))
    assert "m1-curve-ppl-wikitext2" in found


def test_the_pareto_front_is_what_nothing_beats() -> None:
    generator = random.Random(0)
    for lower in (True, False):
        points = [(generator.randrange(8) / 8, generator.randrange(8) / 8) for _ in range(40)]
        sign = 1 if lower else -1

        def beats(p: tuple[float, float], q: tuple[float, float], sign: int = sign) -> bool:
            return p != q and p[0] <= q[0] and sign * p[1] <= sign * q[1]

        front = [points[i] for i in pareto_front(points, second_lower=lower)]
        assert set(front) == {q for q in points if not any(beats(p, q) for p in points)}
        assert all(a[0] < b[0] for a, b in itertools.pairwise(front))


def test_pair_tables_are_drawn_apart_by_run() -> None:
    values = ((None, -1.0), (-1.0, None))
    tables = [PairTable(m, (0, 1), values, Path(run), "nats") for run in ("a", "b") for m in ("q", "o")]
    figures = pair_figures(tables)
    assert [figure.key for figure in figures] == ["sharing-1", "sharing-2"]
    assert "q: sharing pays for 2 of 2 entries" in figures[0].alt
    assert pair_figures([]) == []


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    light, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_stand_out_in_both_schemes() -> None:
    style = (Path(drawing.__file__).parent / "templates" / "page.css").read_text()
    light, dark = style.split("prefers-color-scheme: dark")[:2]
    for i, colour in enumerate(drawing.COLOURS):
        assert f"--c{i}: {colour};" in light  # files and page agree
        (twin,) = re.findall(rf"--c{i}: (#[0-9a-f]{{6}});", dark.split("}")[0])
        assert _contrast(colour, "#ffffff") >= 3
        assert _contrast(twin, "#1a1f26") >= 3
