"""Comparisons in turns: known ratios are found, no difference stays none, and a machine that drifts is noticed."""

from __future__ import annotations

import numpy as np
import pytest

from bs_exp.evaluation.in_turns import FEWEST_ROUNDS, compare_rounds, in_turn, median_interval

ROUNDS = 9
REPEATS = 400


def _times(
    ratio: float, *, drift: float = 0.0, noise: float = 0.03, outliers: float = 0.0, seed: int = 0
) -> tuple[list[float], list[float]]:
    """Seconds of both, in the order of `in_turn`; the machine's speed grows by `drift` over all runs, evenly.

    With `outliers` that share of the runs takes one to three times as long: something else ran on the machine.
    """
    random = np.random.default_rng(seed)
    times: tuple[list[float], list[float]] = ([], [])
    for number, i in enumerate(in_turn(2, ROUNDS)):
        speed = (1.0 + drift) ** (number / (2 * ROUNDS - 1)) * (ratio if i else 1.0)
        disturbed = random.uniform(1.0, 3.0) if random.random() < outliers else 1.0
        times[i].append(disturbed * random.lognormal(0.0, noise) / speed)
    return times


def _exact_interval(values: list[float]) -> tuple[float, float]:
    """By counting: of all 2^n ways in which n values fall to either side of the median, at most 2.5 % lie outside."""
    ordered, n = sorted(values), len(values)
    below = np.array([bin(way).count("1") for way in range(2**n)])
    cut = max(k for k in range(n // 2) if np.mean(below <= k) <= 0.025)
    return ordered[cut], ordered[n - 1 - cut]


@pytest.mark.parametrize("rounds", [6, 7, 9, 12])
def test_the_interval_is_that_of_counting_signs(rounds: int) -> None:
    values = np.random.default_rng(rounds).normal(size=rounds).tolist()
    assert median_interval(values) == _exact_interval(values)


def test_too_few_rounds_have_no_interval_and_show_no_difference() -> None:
    assert median_interval([1.0] * (FEWEST_ROUNDS - 1)) is None
    few = compare_rounds([2.0] * 5, [1.0] * 5)
    assert (few.ratio, few.interval, few.is_difference) == (2.0, None, False)
    assert compare_rounds([2.0] * 6, [1.0] * 6).is_difference
    assert not compare_rounds([2.0], [1.0]).is_difference


@pytest.mark.parametrize("ratio", [0.8, 1.25])
@pytest.mark.parametrize("outliers", [0.0, 0.05])
def test_a_known_ratio_is_found_and_held_by_the_interval(ratio: float, outliers: float) -> None:
    found = [compare_rounds(*_times(ratio, outliers=outliers, seed=seed)) for seed in range(REPEATS)]
    held = np.mean([c.interval is not None and c.interval[0] <= ratio <= c.interval[1] for c in found])
    assert held > 0.93  # 96.1 % at 9 rounds, less three standard errors
    assert np.median([c.ratio for c in found]) == pytest.approx(ratio, rel=0.01)
    said = [c.ratio for c in found if c.is_difference]
    assert len(said) > (0.95 if not outliers else 0.75) * REPEATS
    assert all((value > 1) == (ratio > 1) for value in said)


@pytest.mark.parametrize("drift", [0.0, 0.3, -0.5])
def test_where_there_is_no_difference_none_is_said(drift: float) -> None:
    said = [compare_rounds(*_times(1.0, drift=drift, seed=seed)).is_difference for seed in range(REPEATS)]
    assert np.mean(said) < 0.07  # 3.9 % at 9 rounds, and three standard errors


def test_a_change_below_that_of_the_machine_is_withheld_and_one_above_is_not() -> None:
    slow_machine = [compare_rounds(*_times(1.1, drift=0.6, noise=0.01, seed=seed)) for seed in range(50)]
    assert not any(c.is_difference for c in slow_machine)
    assert all(c.interval is not None and c.interval[0] > 1.0 for c in slow_machine)  # so it is the drift that decides
    # Evenly over all runs: the halves' middles are 5 of 9 rounds apart.
    assert np.median([c.drift for c in slow_machine]) == pytest.approx(1.6 ** (10 / 17) - 1, rel=0.05)
    assert all(compare_rounds(*_times(1.5, drift=0.1, noise=0.01, seed=seed)).is_difference for seed in range(50))


def test_a_machine_that_slows_down_between_two_blocks_does_not_make_a_difference() -> None:
    """Timed one after the other, ranges are disjoint and the change is 65 %; in turns there is none to see."""
    speed = np.where(np.arange(2 * ROUNDS) < ROUNDS, 1.0, 1.65) * np.random.default_rng(0).lognormal(
        0, 0.01, 2 * ROUNDS
    )
    first, second = 1 / speed[:ROUNDS], 1 / speed[ROUNDS:]
    assert second.max() < first.min()
    times: tuple[list[float], list[float]] = ([], [])
    for number, i in enumerate(in_turn(2, ROUNDS)):
        times[i].append(float(1 / speed[number]))
    assert not compare_rounds(*times).is_difference
