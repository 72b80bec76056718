"""Groups and ranks chosen together: against all contiguous partitions, by brute force."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bs_exp.allocation.water_filling import WaterFilling
from bs_exp.errors import ConfigError
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.protocols import AllocationProblem, Layout
from bs_exp.rank_budget import spectrum_choices
from bs_exp.sharing.optimal import OptimalSharing, best_cut
from bs_exp.testing.measures import architecture, problem, random_measures
from bs_exp.types import LossUnit, WeightGroup

LAYOUTS: list[Layout] = [PlainLayout(), PivotedLayout()]


def partitions(matrix: str, layers: int, g_max: int, shape: tuple[int, int]) -> Iterator[tuple[WeightGroup, ...]]:
    for marks in itertools.product((False, True), repeat=layers - 1):
        edges = [0, *(i + 1 for i, mark in enumerate(marks) if mark), layers]
        parts = [tuple(range(a, b)) for a, b in itertools.pairwise(edges)]
        if max(map(len, parts)) <= g_max:
            yield tuple(WeightGroup(matrix, part, *shape) for part in parts)


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize("g_max", [1, 2, 3, 6])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), exponent=st.floats(-3.0, 4.0))
def test_a_cut_is_the_best_of_all_at_its_price(layout: Layout, g_max: int, seed: int, exponent: float) -> None:
    model, price = architecture(6, q=(8, 6)), 10.0**exponent
    measures = random_measures(model, seed, LossUnit.NATS)
    groups = {group for partition in partitions("q", 6, g_max, (8, 6)) for group in partition}
    candidates = {group: spectrum_choices(measures.spectrum(group), layout) for group in groups}

    def value(group: WeightGroup) -> float:
        found = candidates[group]
        return float((found.losses + price * found.costs).min())

    best = min(sum(map(value, partition)) for partition in partitions("q", 6, g_max, (8, 6)))
    cut = best_cut(WeightGroup("q", tuple(range(6)), 8, 6), candidates, price)
    assert sum(map(value, cut)) == pytest.approx(best, rel=1e-12)
    assert max(group.size for group in cut) <= g_max


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), ratio=st.sampled_from([0.4, 0.5, 0.7, 0.9]))
def test_within_the_budget_nearly_nothing_is_better(layout: Layout, seed: int, ratio: float) -> None:
    """Oracle: water-filling on every pair of partitions. Between prices the optimum may differ by a component or so."""
    model = architecture(4, q=(8, 8), down=(10, 6))
    measures = random_measures(model, seed, LossUnit.NATS)

    def loss(groups: tuple[WeightGroup, ...]) -> float:
        spectra = tuple(measures.spectrum(group) for group in groups)
        return WaterFilling(min_ratio=0.0).allocate(AllocationProblem(spectra, ratio, layout)).predicted_loss

    every = itertools.product(partitions("q", 4, 3, (8, 8)), partitions("down", 4, 1, (10, 6)))
    losses = sorted(loss((*q, *down)) for q, down in every)
    found = OptimalSharing(matrices=("q",), g_max=3).groups(problem(model, measures, ratio, layout))
    total = sum(float(measures.spectrum(WeightGroup("q", (i,), 8, 8)).energies.sum()) for i in range(4))
    assert losses[0] - 1e-9 <= loss(found) <= losses[0] + 0.01 * total
    assert all(group.size == 1 for group in found if group.matrix == "down")


def test_equal_layers_share_and_unrelated_ones_do_not() -> None:
    model = architecture(4, q=(12, 12))
    measures = random_measures(model, 0, LossUnit.NATS)
    eye = torch.eye(12, dtype=torch.float64)
    for layer in range(4):
        measures.grams["q", layer] = eye  # type: ignore[index]
    measures.weights["q", 1] = measures.weights["q", 0]  # type: ignore[index]
    measures.weights["q", 3] = measures.weights["q", 2]  # type: ignore[index]
    groups = OptimalSharing(matrices=("q",), g_max=4).groups(problem(model, measures, 0.4))
    assert (0, 1) in [g.layers[:2] for g in groups] and all(len(g.layers) % 2 == 0 for g in groups)


def test_everything_kept_is_no_sharing() -> None:
    model = architecture(4)
    measures = random_measures(model, 0, LossUnit.NATS)
    groups = OptimalSharing(matrices=("q", "k"), g_max=4).groups(problem(model, measures, 1.0))
    assert all(group.size == 1 for group in groups)


def test_every_candidate_is_measured_once() -> None:
    model = architecture(6, q=(8, 8), down=(10, 6))
    measures = random_measures(model, 0, LossUnit.NATS)
    OptimalSharing(matrices=("q",), g_max=3).groups(problem(model, measures))
    assert len(measures.asked) == len(set(measures.asked)) == (6 + 5 + 4) + 6


def test_losses_that_cannot_be_added_are_refused() -> None:
    model = architecture(4)
    with pytest.raises(ConfigError, match=r"must be in nats, got output_norm.*whitening=two_sided"):
        OptimalSharing(matrices=("q",), g_max=2).groups(problem(model, random_measures(model)))
    with pytest.raises(ConfigError, match="names no matrix type of this model"):
        OptimalSharing(matrices=("gate",), g_max=5).check(model)
