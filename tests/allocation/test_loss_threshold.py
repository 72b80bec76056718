"""Loss threshold: the smallest ranks below it, and the smallest threshold that the budget meets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bs_exp.allocation.loss_threshold import LossThreshold
from bs_exp.errors import ConfigError
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.protocols import AllocationProblem, Layout
from bs_exp.types import Spectrum
from tests.support.spectra import group, in_nats, problem

GROUPS = [group("q", 0, d_in=12, d_out=12), group("k", 0, 1, d_in=12, d_out=8), group("down", 0, d_in=20, d_out=12)]
LAYOUTS: list[Layout] = [PlainLayout(), PivotedLayout()]


def drawn(seed: int, ratio: float, layout: Layout) -> AllocationProblem:
    generator = torch.Generator().manual_seed(seed)
    spectra = []
    for member in GROUPS:
        values = torch.rand(member.full_rank, generator=generator, dtype=torch.float64).sort(descending=True).values
        spectra.append(Spectrum(group=member, singular_values=values, energies=values.square(), ridge=0.0))
    return problem(spectra, ratio, layout=layout)


def smallest(case: AllocationProblem, threshold: float, relative: bool) -> list[int | None]:
    """Oracle: try every rank; one that costs as much as the dense group is the dense group."""
    ranks: list[int | None] = []
    for s in case.spectra:
        whole = math.sqrt(float(s.energies.sum())) if relative else 1.0
        rank = 1
        while math.sqrt(float(s.energies[rank:].sum())) / whole > threshold:
            rank += 1
        ranks.append(rank if case.layout.parameters(s.group, rank) < s.group.parameters else None)
    return ranks


def cost(case: AllocationProblem, ranks: list[int | None]) -> int:
    pairs = zip(case.spectra, ranks, strict=True)
    return sum(s.group.parameters if r is None else case.layout.parameters(s.group, r) for s, r in pairs)


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize("relative", [True, False])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), threshold=st.floats(0.05, 0.99))
def test_a_given_threshold_gives_the_smallest_ranks(
    layout: Layout, relative: bool, seed: int, threshold: float
) -> None:
    case = drawn(seed, 1.0, layout)
    plan = LossThreshold(max_loss=threshold, relative=relative).allocate(case)
    assert [p.rank for p in plan.groups] == smallest(case, threshold, relative)


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), ratio=st.floats(0.4, 0.95))
def test_the_threshold_that_meets_the_budget(layout: Layout, seed: int, ratio: float) -> None:
    """Oracle: a fine scan. No group is worse than at the smallest affordable threshold of the scan."""
    case = drawn(seed, ratio, layout)
    plan = LossThreshold(max_loss=None, relative=False).allocate(case)
    budget = ratio * plan.dense_parameters
    scan = next(t / 1000 for t in range(1, 10_000) if cost(case, smallest(case, t / 1000, False)) <= budget)
    assert max(p.predicted_loss for p in plan.groups) <= scan
    assert plan.parameters <= budget


def test_thresholds_in_nats() -> None:
    case = problem([in_nats(group("q", 0), [0.5, 0.3, 0.1] + [0.0] * 37)], 0.9)
    assert LossThreshold(max_loss=0.15, relative=False).allocate(case).groups[0].rank == 2


def test_a_threshold_beyond_the_budget_says_what_it_needs() -> None:
    case = drawn(0, 0.5, PlainLayout())
    with pytest.raises(ConfigError, match=r"max_loss=0\.1 keeps 1\.0000 .* more than retain_ratio 0\.5.*loss of \d"):
        LossThreshold(max_loss=0.1, relative=False).allocate(case)


@pytest.mark.parametrize("loss", [0.0, -1.0, float("nan")])
def test_max_loss_out_of_range(loss: float) -> None:
    with pytest.raises(ConfigError, match="max_loss must be above 0"):
        LossThreshold(max_loss=loss, relative=False)


def test_a_share_of_the_whole_is_below_one() -> None:
    with pytest.raises(ConfigError, match=r"max_loss must be below 1 with allocation\.relative=true.*got 1\.0"):
        LossThreshold(max_loss=1.0, relative=True)
