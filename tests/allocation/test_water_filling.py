"""Bounds of water-filling: kept exactly, by the best plan among all that keep them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bs_exp.allocation.water_filling import WaterFilling
from bs_exp.errors import ConfigError
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.protocols import AllocationProblem, Layout
from bs_exp.rank_budget import parameter_budget
from bs_exp.types import RankPlan, Spectrum
from tests.support.spectra import group, in_nats

LAYOUTS: list[Layout] = [PlainLayout(), PivotedLayout()]
GROUPS = [group("q", 0, d_in=16, d_out=16), group("k", 0, 1, d_in=16, d_out=8), group("down", 1, d_in=24, d_out=16)]


def spectra(seed: int) -> list[Spectrum]:
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.rand(g.full_rank, generator=generator, dtype=torch.float64) ** 4 for g in GROUPS]
    return [in_nats(g, d.sort(descending=True).values.tolist()) for g, d in zip(GROUPS, draws, strict=True)]


def plan_of(ratio: float, layout: Layout = LAYOUTS[0], seed: int = 0, **dials: Any) -> RankPlan:
    return WaterFilling(**{"min_ratio": 0.0, **dials}).allocate(AllocationProblem(tuple(spectra(seed)), ratio, layout))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), ratio=st.floats(0.5, 0.9))
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_bounded_plans_are_near_the_best_of_all_that_keep_the_bounds(layout: Layout, seed: int, ratio: float) -> None:
    """Oracle: brute force over all ranks whose share of the group lies within its bounds."""
    bounds = {0: (0.4, 0.9), 1: (0.3, 0.95)}
    # The group of both layers keeps to both.
    limits = [(0.4, 0.9), (0.4, 0.9), (0.3, 0.95)]
    given_spectra = spectra(seed)
    budget = parameter_budget(sum(g.parameters for g in GROUPS), ratio)

    def cost(position: int, rank: int | None) -> int:
        g = GROUPS[position]
        return g.parameters if rank is None else layout.parameters(g, rank)

    options = []
    for position, (low, high) in enumerate(limits):
        ranks = [rank for rank in range(1, GROUPS[position].full_rank)]
        # The least rank is rounded down: the largest that costs no more than the bound.
        least = max(rank for rank in ranks if cost(position, rank) <= low * GROUPS[position].parameters)
        most = high * GROUPS[position].parameters
        options.append([rank for rank in ranks if rank >= least and cost(position, rank) <= most])
    affordable = [
        ranks for ranks in itertools.product(*options) if sum(cost(i, rank) for i, rank in enumerate(ranks)) <= budget
    ]
    losses = [sum(s.loss(rank) for s, rank in zip(given_spectra, ranks, strict=True)) for ranks in affordable]
    plan = plan_of(ratio, layout, seed, layer_bounds=bounds)
    chosen = tuple(p.rank for p in plan.groups)
    assert chosen in affordable
    dropped = max(float(s.energies[rank]) for s, rank in zip(given_spectra, chosen, strict=True))
    assert min(losses) - 1e-12 <= plan.predicted_loss <= min(losses) + 2 * dropped + 1e-12
    # Nothing that fits within budget and bounds is left over.
    for position, rank in enumerate(chosen):
        bigger = [other for other in options[position] if other > rank]
        assert not bigger or cost(position, bigger[0]) - cost(position, rank) > budget - plan.parameters


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), ratio=st.floats(0.5, 0.9))
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_ranks_are_multiples_and_near_the_best_of_such_plans(layout: Layout, seed: int, ratio: float) -> None:
    """Oracle: brute force over multiples of 4, one component and dense."""
    given_spectra = spectra(seed)
    budget = parameter_budget(sum(g.parameters for g in GROUPS), ratio)

    def cost(position: int, rank: int | None) -> int:
        g = GROUPS[position]
        return g.parameters if rank is None else layout.parameters(g, rank)

    options = [[1, *range(4, g.full_rank, 4), None] for g in GROUPS]
    options = [[r for r in ranks if cost(i, r) <= GROUPS[i].parameters] for i, ranks in enumerate(options)]
    affordable = [
        ranks for ranks in itertools.product(*options) if sum(cost(i, rank) for i, rank in enumerate(ranks)) <= budget
    ]
    losses = [sum(s.loss(rank) for s, rank in zip(given_spectra, ranks, strict=True)) for ranks in affordable]
    plan = plan_of(ratio, layout, seed, multiple=4)
    chosen = tuple(p.rank for p in plan.groups)
    assert chosen in affordable
    steps = [float(s.energies[rank : rank + 4].sum()) for s, rank in zip(given_spectra, chosen, strict=True) if rank]
    assert min(losses) - 1e-12 <= plan.predicted_loss <= min(losses) + 2 * max(steps, default=0.0) + 1e-12
    assert plan_of(ratio, layout, seed, multiple=1) == plan_of(ratio, layout, seed)


def test_bounds_of_one_layer_leave_the_others_alone() -> None:
    free, held = plan_of(0.7), plan_of(0.7, layer_bounds={1: [0.2, 0.5]})
    assert held.groups[2].parameters <= 0.5 * GROUPS[2].parameters
    assert held.groups[1].parameters <= 0.5 * GROUPS[1].parameters
    assert held.groups[0].parameters >= free.groups[0].parameters


def test_where_all_are_at_their_upper_bounds_less_is_kept() -> None:
    plan = plan_of(0.9, layer_bounds={0: (0.0, 0.5), 1: (0.0, 0.5)})
    assert all(p.parameters <= 0.5 * p.group.parameters for p in plan.groups) and plan.retain_ratio < 0.5
    assert all(
        p.rank is not None and PlainLayout().parameters(p.group, p.rank + 1) > 0.5 * p.group.parameters
        for p in plan.groups
    )


def test_max_ratio_gives_way_to_a_larger_budget() -> None:
    assert all(p.parameters <= 0.7 * p.group.parameters for p in plan_of(0.6, max_ratio=0.7).groups)
    assert plan_of(1.0, max_ratio=0.7).retain_ratio == 1.0
    assert plan_of(0.8) == plan_of(0.8, max_ratio=1.0, layer_bounds={})


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"layer_bounds": {5: (0.1, 0.5)}}, r"names layer 5, but the model's layers are 0 to 1"),
        ({"layer_bounds": {0: (0.9, 1.0), 1: (0.9, 1.0)}}, r"retain_ratio 0\.6 is below the .* lower bounds"),
        ({"layer_bounds": {0: (0.1, 0.3), 1: (0.4, 0.9)}}, r"k\[0,1\] has one share .* at least 0\.4 .* most 0\.3"),
        ({"multiple": 1000}, r"allocation\.multiple must be at most the largest rank, \d+, got 1000"),
    ],
)
def test_bounds_that_do_not_fit_the_model(dials: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WaterFilling(min_ratio=0.0, **dials).check(tuple(GROUPS), 0.6, PlainLayout())


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"multiple": 0}, r"^multiple must be .*1.*got 0"),
        ({"max_ratio": 0.0}, r"max_ratio must be above 0 .* got 0\.0"),
        ({"min_ratio": 0.5, "max_ratio": 0.4}, r"max_ratio must be above 0\.5"),
        ({"layer_bounds": [0.5, 1.0]}, r"layer_bounds must name layers, .* got \[0\.5, 1\.0\]"),
        ({"layer_bounds": {0: 0.5}}, r"layer_bounds must give .* got 0\.5 for layer 0"),
        ({"layer_bounds": {0: ("a", "b")}}, r"layer_bounds must give .* got \['a', 'b'\]"),
        ({"layer_bounds": {0: (0.5,)}}, r"layer_bounds must give \[least, most\] .* got \[0\.5\] for layer 0"),
        ({"layer_bounds": {0: (0.5, 0.4)}}, r"layer_bounds must give .* got \[0\.5, 0\.4\]"),
        ({"layer_bounds": {0: (0.5, 1.2)}}, r"layer_bounds must give"),
        ({"layer_bounds": {"q": (0.5, 1.0)}}, r"layer_bounds must name layers by their numbers, from 0, got 'q'"),
        ({"layer_bounds": {-1: (0.5, 1.0)}}, r"layer_bounds must name layers"),
    ],
)
def test_bounds_out_of_range(dials: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WaterFilling(**{"min_ratio": 0.0, **dials})
