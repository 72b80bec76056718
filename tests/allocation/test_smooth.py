"""The smooth problem: its curves are convex, and its solution is the optimum."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bs_exp.allocation.smooth import SmoothAllocation, convex_curve
from bs_exp.errors import ConfigError
from tests.support.spectra import group, problem


def smooth(**dials: object) -> SmoothAllocation:
    settings: dict[str, object] = {
        "smoothness": 1.0, "unit": "block", "relative": False, "min_ratio": 0.1, "max_ratio": 1.0
    }  # fmt: skip
    return SmoothAllocation(**(settings | dials))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(losses=st.lists(st.floats(0.0, 100.0), min_size=2, max_size=30), seed=st.integers(0, 100))
def test_curves_are_convex_and_close_to_the_hull(losses: list[float], seed: int) -> None:
    heights = np.array([*sorted(losses, reverse=True), 0.0])
    inner = np.sort(np.random.default_rng(seed).uniform(0.01, 0.99, len(heights) - 2))
    shares = np.concatenate([[0.0], np.unique(inner), [1.0]])
    curve = convex_curve(shares, np.append(heights[: len(shares) - 1], 0.0))
    points = np.linspace(0.0, 1.0, 301)
    slopes = curve.derivative()(points)
    assert (np.diff(slopes) >= -1e-9 * (1 + abs(slopes).max())).all()
    assert (slopes <= 1e-9).all()
    assert float(curve(1.0)) == pytest.approx(0.0, abs=1e-9)


def test_a_straight_line_stays_one() -> None:
    shares = np.linspace(0.0, 1.0, 11)
    curve = convex_curve(shares, 5.0 * (1.0 - shares))
    assert curve(np.array([0.0, 0.33, 1.0])) == pytest.approx([5.0, 3.35, 0.0])


@pytest.mark.parametrize("smoothness", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("relative", [False, True])
def test_the_solution_is_the_optimum(smoothness: float, relative: bool) -> None:
    """Oracle: every plan on a grid of 1/200, its loss read off the exact tails, for three blocks of two matrices."""
    exponents = {
        group("q", 0, d_in=64, d_out=64): 0.4, group("q", 1, d_in=64, d_out=64): 0.9,
        group("q", 2, d_in=64, d_out=64): 1.4, group("o", 0, d_in=64, d_out=64): 0.7,
        group("o", 1, d_in=64, d_out=64): 0.5, group("o", 2, d_in=64, d_out=64): 1.0,
    }  # fmt: skip
    case = problem(exponents, 0.6)
    strategy = smooth(smoothness=smoothness, relative=relative, min_ratio=0.2, max_ratio=0.95)
    shares = strategy.shares(case)[:3]
    assert shares == strategy.shares(case)[3:]  # one per block
    assert sum(shares) / 3 == pytest.approx(0.6, abs=1e-9)

    def loss(exponent: float, share: float) -> float:
        """Of the lower convex hull: the tails at whole ranks below break-even, then a line to dense."""
        energies = 100.0**2 * np.arange(1, 65, dtype=float) ** (-2 * exponent)
        tails = np.concatenate([energies[::-1].cumsum()[::-1], [0.0]])
        x = np.array([*(k * 128 / 4096 for k in range(32)), 1.0])
        y = np.array([*tails[:32], 0.0])
        lines = [
            np.interp(share, [x[i], x[j]], [y[i], y[j]])
            for i, j in itertools.combinations(range(33), 2)
            if x[i] <= share <= x[j]
        ]
        return min(lines) / (tails[0] if relative else 1.0)

    grid = np.round(np.arange(0.2, 0.95001, 0.005), 3)
    curves = [{s: loss(e, s) + loss(f, s) for s in grid} for e, f in ((0.4, 0.7), (0.9, 0.5), (1.4, 1.0))]
    scale = sum(loss(e, 0.6) for e in exponents.values())

    def value(plan: tuple[float, ...], terms: list[float]) -> float:
        return sum(terms) / scale + smoothness * sum((b - a) ** 2 for a, b in itertools.pairwise(plan))

    best = min(
        value((a, b, c), [curves[0][a], curves[1][b], curves[2][c]])
        for a, b in itertools.product(grid, grid)
        if (c := round(1.8 - a - b, 3)) in curves[2]
    )
    pairs = ((0.4, 0.7), (0.9, 0.5), (1.4, 1.0))
    found = value(tuple(shares), [loss(e, s) + loss(f, s) for (e, f), s in zip(pairs, shares, strict=True)])
    assert found <= best * 1.003  # kinks are rounded off, no more


@pytest.mark.parametrize("bounds", [{"min_ratio": 0.5}, {"max_ratio": 0.5}, {"max_ratio": 0.3}], ids=repr)
def test_a_mean_on_a_bound_leaves_one_plan(bounds: dict[str, object]) -> None:
    exponents = {group("q", layer): 0.3 + 0.3 * layer for layer in range(4)}
    assert smooth(**bounds).shares(problem(exponents, 0.5)) == pytest.approx([0.5] * 4)


def test_much_smoothness_is_uniform_and_none_is_not() -> None:
    exponents = {group("q", layer): 0.3 + 0.3 * layer for layer in range(4)}
    stiff, free = (smooth(smoothness=s).shares(problem(exponents, 0.5)) for s in (1e6, 0.0))
    assert stiff == pytest.approx([0.5] * 4, abs=1e-3)
    assert max(free) - min(free) > 0.2


def test_by_matrix_each_type_is_smooth_over_its_own_depth() -> None:
    exponents = {group(m, layer): e for m, e in (("q", 0.3), ("o", 1.5)) for layer in range(3)}
    shares = smooth(unit="matrix", smoothness=1e6).shares(problem(exponents, 0.5))
    assert shares[:3] == pytest.approx([shares[0]] * 3, abs=1e-3)
    assert shares[3:] == pytest.approx([shares[3]] * 3, abs=1e-3)
    assert abs(shares[0] - shares[3]) > 0.2


def test_a_shared_group_takes_the_mean_of_its_layers() -> None:
    exponents = {group("q", 0, 1): 0.5, group("o", 0): 0.3, group("o", 1): 1.2}
    shares = smooth(smoothness=0.01).shares(problem(exponents, 0.5))
    assert shares[0] == pytest.approx((shares[1] + shares[2]) / 2)
    assert shares[1] != pytest.approx(shares[2], abs=0.05)


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"unit": "head"}, "unit must be one of block, matrix, got 'head'"),
        ({"smoothness": -1.0}, r"smoothness must be at least 0 .* got -1\.0"),
        ({"smoothness": float("nan")}, "smoothness must be at least 0"),
        ({"min_ratio": 0.5, "max_ratio": 0.5}, r"min_ratio < max_ratio <= 1, got 0\.5 and 0\.5"),
    ],
)
def test_settings_out_of_range(dials: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        smooth(**dials)


def test_a_budget_below_the_lower_bound() -> None:
    with pytest.raises(ConfigError, match=r"retain_ratio 0\.3 is below .*min_ratio=0\.4"):
        smooth(min_ratio=0.4).check((group("q", 0, d_in=41, d_out=41),), 0.3, problem([], 0.3).layout)
