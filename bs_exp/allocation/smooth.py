"""Kept shares that change smoothly over depth, as the solution of a convex problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PPoly
from scipy.optimize import minimize

from bs_exp.errors import ConfigError
from bs_exp.protocols import AllocationProblem, Layout
from bs_exp.rank_budget import check_affordable, make_plan, share_out, spectrum_choices
from bs_exp.types import RankPlan, Spectrum, Statistic, WeightGroup
from bs_exp.validation import check_choice

Vector = NDArray[np.float64]
_UNITS = ("block", "matrix")


@dataclass(frozen=True, kw_only=True)
class SmoothAllocation:
    """Minimises `sum_g f_g(p_g) / F + smoothness * sum_l (p_(l+1) - p_l)^2` over kept shares p within bounds.

    `f_g` is the squared loss (or nats) of a group as a function of its kept share, made convex and smooth; `F` the sum
    of them at the uniform share, so that `smoothness` has no unit: at 1, a step of 0.1 between neighbours costs as much
    as 1 % of the uniform plan's loss. The shares, weighted by parameters, have the mean `retain_ratio` and lie in
    [`min_ratio`, `max_ratio`] (a larger retain_ratio replaces `max_ratio`). `unit=block`: one share per layer, for all
    its matrices; `unit=matrix`: one per matrix, smooth over the depth of its type. A group of several layers takes the
    mean of its layers' shares. `relative` divides each loss by that of dropping the whole group.

    Solved by SciPy's SLSQP with exact gradients: the problem is small, dense and smooth, with bounds and one equality,
    which SLSQP keeps exactly; it needs no second derivatives, and SciPy is a dependency anyway.
    """

    smoothness: float
    unit: str
    relative: bool
    min_ratio: float
    max_ratio: float

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, _UNITS)
        if not 0.0 <= self.smoothness < float("inf"):
            raise ConfigError(f"smoothness must be at least 0 (0 turns it off), got {self.smoothness}.")
        if not 0.0 <= self.min_ratio < self.max_ratio <= 1.0:
            raise ConfigError(
                f"min_ratio and max_ratio must satisfy 0 <= min_ratio < max_ratio <= 1, got {self.min_ratio} and "
                f"{self.max_ratio}."
            )

    def check(self, groups: tuple[WeightGroup, ...], retain_ratio: float, layout: Layout) -> None:
        check_affordable(groups, retain_ratio, layout, lowest=self.min_ratio)
        if retain_ratio < self.min_ratio:
            raise ConfigError(
                f"retain_ratio {retain_ratio} is below allocation.min_ratio={self.min_ratio}. "
                "Raise retain_ratio or lower allocation.min_ratio."
            )

    def allocate(self, problem: AllocationProblem) -> RankPlan:
        """Ranks that spend the budget up to less than one component.

        Raises ConfigError if min_ratio, or one component per group, exceeds the budget, or SLSQP does not converge.
        """
        self.check(tuple(s.group for s in problem.spectra), problem.retain_ratio, problem.layout)
        if problem.retain_ratio == 1.0:
            return make_plan(problem, [None] * len(problem.spectra))
        wanted = self.shares(problem)
        return make_plan(problem, share_out(problem, wanted, lowest=self.min_ratio, highest=self.max_ratio))

    def shares(self, problem: AllocationProblem) -> list[float]:
        """The optimal kept share of each group."""
        owned = [[(self._series(s.group), layer) for layer in s.group.blocks] for s in problem.spectra]
        variables = sorted({variable for members in owned for variable in members})
        mean = np.array([[(v in members) / len(members) for v in variables] for members in owned])
        # One row per pair of neighbours in a series; the same layer of another series is no neighbour.
        one = np.eye(len(variables))
        pairs = [(i, i + 1) for i in range(len(variables) - 1) if variables[i][0] == variables[i + 1][0]]
        step = np.array([one[after] - one[before] for before, after in pairs]).reshape(-1, len(variables))
        sizes = np.array([float(s.group.parameters) for s in problem.spectra])
        shares = minimise(
            [self._curve(spectrum, problem.layout) for spectrum in problem.spectra],
            mean=mean,
            step=step,
            weights=sizes @ mean / sizes.sum(),
            smoothness=self.smoothness,
            target=problem.retain_ratio,
            bounds=(self.min_ratio, max(self.max_ratio, problem.retain_ratio)),
        )
        return [float(share) for share in mean @ shares]

    def _series(self, group: WeightGroup) -> str:
        return group.matrix if self.unit == "matrix" else ""

    def _curve(self, spectrum: Spectrum, layout: Layout) -> PPoly:
        choices = spectrum_choices(spectrum, layout)
        whole = float(spectrum.energies.double().clamp_min(0.0).sum())
        shares = np.concatenate([[0.0], choices.costs.numpy() / spectrum.group.parameters])
        losses = np.concatenate([[whole], choices.losses.numpy()])
        return convex_curve(shares, losses / whole if self.relative and whole else losses)


def convex_curve(shares: Vector, losses: Vector) -> PPoly:
    """A convex, piecewise quadratic curve of the loss over the kept share, with a continuous slope.

    The points are falling losses at shares that rise from 0 to 1. The slope of their lower convex hull is interpolated
    linearly between the middles of its pieces: kinks, which stop a line search, become short parabolas.
    """
    hull: list[int] = []
    for point in range(len(shares)):
        while len(hull) > 1 and _slope(shares, losses, hull[-2], hull[-1]) >= _slope(shares, losses, hull[-1], point):
            hull.pop()
        hull.append(point)
    x, y = shares[hull], losses[hull]
    slopes = np.diff(y) / np.diff(x)
    knots = np.concatenate([[0.0], 0.5 * (x[1:] + x[:-1]), [1.0]])
    slopes = np.concatenate([slopes[:1], slopes, slopes[-1:]])
    slope = PPoly(np.stack([np.diff(slopes) / np.diff(knots), slopes[:-1]]), knots)
    curve = slope.antiderivative()
    curve.c[-1] += y[-1] - curve(1.0)
    return curve


def minimise(
    curves: Sequence[PPoly],
    *,
    mean: Vector,
    step: Vector,
    weights: Vector,
    smoothness: float,
    target: float,
    bounds: tuple[float, float],
) -> Vector:
    """Shares p with `weights @ p = target`, within bounds, of least `sum f(mean @ p) / F + smoothness |step @ p|^2`.

    Raises ConfigError if SLSQP does not converge.
    """
    slopes = [curve.derivative() for curve in curves]
    start = np.full(mean.shape[1], target)
    if min(target - bounds[0], bounds[1] - target) < 1e-9:  # their mean lies on a bound, so all shares do
        return start
    scale = sum(float(curve(target)) for curve in curves) or 1.0

    def objective(shares: Vector) -> tuple[float, Vector]:
        groups, steps = mean @ shares, step @ shares
        value = sum(float(curve(share)) for curve, share in zip(curves, groups, strict=True)) / scale
        slope = np.array([float(slope(share)) for slope, share in zip(slopes, groups, strict=True)]) / scale
        return value + smoothness * float(steps @ steps), slope @ mean + 2.0 * smoothness * (steps @ step)

    # Near a ratio of 1 the uniform plan loses almost nothing, and slopes in units of its loss are huge. SLSQP works
    # best with slopes near 1.
    unit = 1.0 / max(1.0, float(np.abs(objective(start)[1]).max()))

    def conditioned(shares: Vector) -> tuple[float, Vector]:
        value, slope = objective(shares)
        return unit * value, unit * slope

    found: Any = minimize(
        conditioned,
        start,
        jac=True,
        method="SLSQP",
        bounds=[bounds] * len(start),
        constraints={"type": "eq", "fun": lambda p: weights @ p - target, "jac": lambda p: weights},
        options={"maxiter": 1000, "ftol": 1e-9 * unit},
    )
    if not found.success:
        raise ConfigError(
            f"allocation=smooth found no optimum: SLSQP says {found.message!r} after {found.nit} steps. Change "
            f"allocation.smoothness (now {smoothness}) or the bounds (now {bounds[0]} and {bounds[1]})."
        )
    shares: Vector = found.x
    return shares


def _slope(x: Vector, y: Vector, start: int, stop: int) -> float:
    return float((y[stop] - y[start]) / (x[stop] - x[start]))
