"""What every allocator keeps: the budget, the bounds, the order of the groups, and its word."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bs_exp.allocation.bayesopt import BayesianSearch
from bs_exp.allocation.dipsvd_heuristic import DipSvdHeuristic
from bs_exp.allocation.effective_rank import EffectiveRank
from bs_exp.allocation.first_order import FirstOrder
from bs_exp.allocation.loss_threshold import LossThreshold
from bs_exp.allocation.manual import ManualAllocation
from bs_exp.allocation.sensitivity import SensitivitySearch
from bs_exp.allocation.smooth import SmoothAllocation
from bs_exp.allocation.svd_llm_v2 import SvdLlmV2
from bs_exp.allocation.uniform import UniformAllocation
from bs_exp.allocation.water_filling import WaterFilling
from bs_exp.errors import ConfigError
from bs_exp.layout.plain import PlainLayout
from bs_exp.protocols import Allocation, AllocationProblem, Layout
from bs_exp.rank_budget import largest_rank, parameter_budget
from bs_exp.testing import AllocationContract, SpendingContract
from bs_exp.testing.allocation import LAYOUTS, problem
from bs_exp.types import LossUnit, Spectrum, WeightGroup
from tests.support.options import strategies


def heuristic(sign: str, max_ratio: float | None = None) -> DipSvdHeuristic:
    return DipSvdHeuristic(
        sign=sign, beta=0.25, effective_rank="energy", threshold=0.9, spread=0.2, min_ratio=None, max_ratio=max_ratio
    )


def smooth(unit: str, smoothness: float, max_ratio: float = 1.0) -> SmoothAllocation:
    return SmoothAllocation(smoothness=smoothness, unit=unit, relative=True, min_ratio=0.1, max_ratio=max_ratio)


def manual(min_ratio: float = 0.0, max_ratio: float = 1.0) -> ManualAllocation:
    return ManualAllocation(
        by_layer=None, by_depth=(2.0, 0.5, 1.0), by_type={"q": 0.7}, min_ratio=min_ratio, max_ratio=max_ratio
    )


def search(unit: str, warm_starts: Mapping[str, Allocation]) -> BayesianSearch:
    return BayesianSearch(
        trials=2,
        sampler="tpe",
        startup_trials=1,
        unit=unit,
        objective="kl",
        num_windows=None,
        pruning="none",
        min_ratio=0.2,
        max_ratio=1.0,
        warm_starts=warm_starts,
        seed=0,
        storage=None,
        study_name=None,
    )


def sensitivity(unit: str) -> SensitivitySearch:
    return SensitivitySearch(ratios=(0.1, 0.4, 0.8), unit=unit, objective="kl", num_windows=None)


# They spend the budget up to less than one component.
SPENDING: list[Allocation] = [
    UniformAllocation(fill=True),
    WaterFilling(min_ratio=0.0),
    WaterFilling(min_ratio=0.2),
    heuristic("paper"),
    heuristic("code", max_ratio=1.0),
    EffectiveRank(beta=0.0),
    SvdLlmV2(),
    LossThreshold(max_loss=None, relative=False),
    LossThreshold(max_loss=None, relative=True),
    smooth("block", 1.0),
    smooth("matrix", 0.0),
    search("matrix", {"uniform": UniformAllocation(fill=True)}),
    sensitivity("block"),
    manual(min_ratio=0.2),
]
ALLOCATORS: list[Allocation] = [
    UniformAllocation(),
    heuristic("code"),
    smooth("block", 0.1, max_ratio=0.7),
    manual(max_ratio=0.8),
    FirstOrder(order="zero_sum"),
    FirstOrder(order="size"),
    *SPENDING,
]


def uniform_rank(group: WeightGroup, ratio: float) -> int:
    return largest_rank(group, parameter_budget(group.parameters, ratio), PlainLayout())


class TestAllocators(AllocationContract):
    refusal = r"retain_ratio 0\.11 .*(component|min_ratio).*Raise retain_ratio"

    @pytest.fixture(scope="class", params=ALLOCATORS, ids=repr)
    @classmethod
    def allocation(cls, request: pytest.FixtureRequest) -> Any:
        return request.param


class TestAllocatorsThatSpend(SpendingContract):
    @pytest.fixture(scope="class", params=SPENDING, ids=repr)
    @classmethod
    def allocation(cls, request: pytest.FixtureRequest) -> Any:
        return request.param


def test_every_option_is_among_them() -> None:
    assert strategies("allocation") == {type(strategy) for strategy in ALLOCATORS}


@pytest.mark.parametrize(
    ("ratio", "size", "d_in", "d_out", "rank"),
    [  # LLaMA-7B, Basis Sharing's own table: q of one layer, of two, of four; up of two; down
        (0.8, 1, 4096, 4096, 1638),
        (0.8, 2, 4096, 4096, 2184),
        (0.8, 4, 4096, 4096, 2621),
        (0.8, 2, 4096, 11008, 2762),
        (0.8, 1, 11008, 4096, 2388),
        (0.5, 32, 4096, 4096, 1985),
        (0.6, 2, 4096, 4096, 1638),
    ],
)
def test_uniform_ranks_are_the_published_ones(ratio: float, size: int, d_in: int, d_out: int, rank: int) -> None:
    assert uniform_rank(WeightGroup("q", tuple(range(size)), d_in, d_out), ratio) == rank


def test_a_remainder_group_gets_its_own_rank() -> None:
    pair, single = WeightGroup("q", (0, 1), 64, 64), WeightGroup("q", (2,), 64, 64)
    plan = UniformAllocation().allocate(problem([pair, single], 0.8))
    assert [p.rank for p in plan.groups] == [34, 25]


def test_rounding_is_of_the_decimal_ratio() -> None:
    """0.7 * 100 * 100 / 200 is 35; in binary floating point 0.7 * 10000 is 7000 but 0.57 * 100 is 56.99..."""
    assert uniform_rank(WeightGroup("q", (0,), 200, 200), 0.57) == 57


def test_too_small_a_ratio_names_the_group() -> None:
    with pytest.raises(ConfigError, match=r"q\[0\] \(16 x 16\) without a single component"):
        UniformAllocation().allocate(problem([WeightGroup("q", (0,), 16, 16)], 0.05))


def nats(group: WeightGroup, energies: list[float]) -> Spectrum:
    values = torch.tensor(energies, dtype=torch.float64)
    return Spectrum(group=group, singular_values=(2 * values).sqrt(), energies=values, ridge=0.0, unit=LossUnit.NATS)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), ratio=st.floats(0.45, 0.95))
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_water_filling_is_near_the_optimum_of_all_plans(layout: Layout, seed: int, ratio: float) -> None:
    """Oracle: brute force over every combination of ranks. The gap is below the best single component left out."""
    generator = torch.Generator().manual_seed(seed)
    groups = [WeightGroup("q", (0,), 6, 6), WeightGroup("k", (0, 1), 6, 4), WeightGroup("down", (0,), 8, 6)]
    draws = [torch.rand(g.full_rank, generator=generator, dtype=torch.float64) ** 4 for g in groups]
    spectra = tuple(nats(g, draw.sort(descending=True).values.tolist()) for g, draw in zip(groups, draws, strict=True))
    budget = parameter_budget(sum(g.parameters for g in groups), ratio)
    options = [[*range(1, g.full_rank), None] for g in groups]
    best = min(
        sum(s.loss(rank) for s, rank in zip(spectra, ranks, strict=True))
        for ranks in itertools.product(*options)
        if sum(
            g.parameters if rank is None else layout.parameters(g, rank) for g, rank in zip(groups, ranks, strict=True)
        )
        <= budget
    )
    plan = WaterFilling(min_ratio=0.0).allocate(AllocationProblem(spectra, ratio, layout))
    found = sum(p.predicted_loss for p in plan.groups)
    dropped = max(
        (float(s.energies[p.rank]) for s, p in zip(spectra, plan.groups, strict=True) if p.rank is not None),
        default=0.0,
    )
    assert plan.parameters <= budget
    assert best - 1e-12 <= found <= best + 2 * dropped + 1e-12


def test_water_filling_spends_all_but_less_than_a_component_and_prefers_what_pays() -> None:
    rich, poor = WeightGroup("q", (0,), 40, 40), WeightGroup("o", (0,), 40, 40)
    spectra = (nats(rich, [1.0] * 40), nats(poor, [1e-6] * 40))
    plan = WaterFilling(min_ratio=0.0).allocate(AllocationProblem(spectra, 0.6, PlainLayout()))
    assert plan.groups[0].rank is None and plan.groups[1].rank == 4
    bounded = WaterFilling(min_ratio=0.3).allocate(AllocationProblem(spectra, 0.6, PlainLayout()))
    assert bounded.groups[1].rank == 6
    assert 0.6 * plan.dense_parameters - plan.parameters < 80


def test_water_filling_says_what_the_least_budget_is() -> None:
    with pytest.raises(ConfigError, match=r"below the 0\.1250 that one component"):
        WaterFilling(min_ratio=0.0).allocate(problem([WeightGroup("q", (0,), 16, 16)], 0.1))
