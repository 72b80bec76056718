"""What every allocator keeps: the budget, the bounds, the order of the groups, and its word."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bs_exp.allocation.bayesopt import BayesianSearch
from bs_exp.allocation.dipsvd_heuristic import DipSvdHeuristic
from bs_exp.allocation.effective_rank import EffectiveRank
from bs_exp.allocation.loss_threshold import LossThreshold
from bs_exp.allocation.manual import ManualAllocation
from bs_exp.allocation.sensitivity import SensitivitySearch
from bs_exp.allocation.smooth import SmoothAllocation
from bs_exp.allocation.svd_llm_v2 import SvdLlmV2
from bs_exp.allocation.uniform import UniformAllocation
from bs_exp.allocation.water_filling import WaterFilling
from bs_exp.errors import ConfigError
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.protocols import Allocation, AllocationProblem, Layout
from bs_exp.rank_budget import largest_rank, parameter_budget
from bs_exp.types import LayerProfile, LossUnit, Spectrum, WeightGroup
from tests.support.options import strategies
from tests.support.scores import FormulaScore


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
    *SPENDING,
]
LAYOUTS: list[Layout] = [PlainLayout(), PivotedLayout()]


def spectrum(group: WeightGroup, seed: int = 0) -> Spectrum:
    generator = torch.Generator().manual_seed(seed)
    # Above 1, as norms over many tokens are.
    values = 1.0 + 99.0 * torch.rand(group.full_rank, generator=generator, dtype=torch.float64) ** 2
    values = values.sort(descending=True).values
    return Spectrum(group=group, singular_values=values, energies=values.square(), ridge=0.0)


def problem(groups: Sequence[WeightGroup], ratio: float, layout: Layout = LAYOUTS[0]) -> AllocationProblem:
    spectra = tuple(spectrum(g, seed) for seed, g in enumerate(groups))
    profile = random_profile(1 + max(layer for g in groups for layer in g.layers))
    return AllocationProblem(spectra, ratio, layout, profile, FormulaScore(lambda plan: plan.predicted_loss))


def random_profile(layers: int) -> LayerProfile:
    generator = torch.Generator().manual_seed(layers)
    values = torch.rand(layers, 32, generator=generator, dtype=torch.float64) ** 4
    return LayerProfile(
        sensitivity=0.1 + torch.rand(layers, generator=generator, dtype=torch.float64),
        output_singular_values=dict(enumerate(values.sort(descending=True).values)),
    )


def uniform_rank(group: WeightGroup, ratio: float) -> int:
    return largest_rank(group, parameter_budget(group.parameters, ratio), PlainLayout())


GROUPS = st.lists(
    st.builds(
        lambda size, d_in, d_out, first: WeightGroup("q", tuple(range(first, first + size)), d_in, d_out),
        st.integers(1, 4), st.integers(8, 64), st.integers(8, 64), st.integers(0, 9),
    ),
    min_size=1, max_size=8, unique_by=lambda g: g.layers[0],
)  # fmt: skip


def test_every_option_is_among_them() -> None:
    assert strategies("allocation") == {type(strategy) for strategy in ALLOCATORS}


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@settings(max_examples=40, deadline=None)
@given(groups=GROUPS, ratio=st.floats(0.35, 1.0))
def test_within_budget_and_bounds(
    allocator: Allocation, layout: Layout, groups: list[WeightGroup], ratio: float
) -> None:
    case = problem(groups, ratio, layout)
    plan = allocator.allocate(case)
    assert [p.group for p in plan.groups] == groups
    assert plan.parameters <= ratio * plan.dense_parameters + 1e-6
    for planned, given_spectrum in zip(plan.groups, case.spectra, strict=True):
        if planned.rank is None:
            assert (planned.parameters, planned.predicted_loss) == (planned.group.parameters, 0.0)
        else:
            assert 1 <= planned.rank <= planned.group.full_rank
            assert planned.parameters == layout.parameters(planned.group, planned.rank) < planned.group.parameters
            tail = float(given_spectrum.energies[planned.rank :].sum())
            assert planned.predicted_loss**2 == pytest.approx(tail, rel=1e-12)
    assert plan.retain_ratio == plan.parameters / plan.dense_parameters
    assert allocator.allocate(case) == plan


@pytest.mark.parametrize("allocator", SPENDING, ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@settings(max_examples=40, deadline=None)
@given(groups=GROUPS, ratio=st.floats(0.35, 1.0))
def test_what_is_left_is_less_than_one_component(
    allocator: Allocation, layout: Layout, groups: list[WeightGroup], ratio: float
) -> None:
    plan = allocator.allocate(problem(groups, ratio, layout))
    left = parameter_budget(plan.dense_parameters, ratio) - plan.parameters
    for planned in plan.groups:
        if planned.rank is not None:  # the next component, or, past break-even, the dense matrices
            dearer = layout.parameters(planned.group, planned.rank + 1)
            assert 0 <= left < min(dearer, planned.group.parameters) - planned.parameters


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=repr)
def test_a_budget_that_no_plan_meets_is_refused_before_there_are_spectra(allocator: Allocation) -> None:
    groups = (WeightGroup("q", (0,), 16, 16), WeightGroup("q", (1,), 16, 16))
    allocator.check(groups, 0.5, PlainLayout())
    with pytest.raises(ConfigError, match=r"retain_ratio 0\.11 .*(component|min_ratio).*Raise retain_ratio"):
        allocator.check(groups, 0.11, PlainLayout())
    with pytest.raises(ConfigError, match=r"retain_ratio 0\.11 "):
        allocator.allocate(problem(groups, 0.11))


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=repr)
def test_everything_kept_is_dense(allocator: Allocation) -> None:
    plan = allocator.allocate(problem([WeightGroup("q", (0, 1), 16, 16)], 1.0))
    assert plan.groups[0].rank is None and plan.retain_ratio == 1.0


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=repr)
@pytest.mark.parametrize("ratio", [0.0, -0.2, 1.0001, float("nan")])
def test_ratio_out_of_range(allocator: Allocation, ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"above 0 and at most 1.*got"):
        allocator.allocate(problem([WeightGroup("q", (0,), 16, 16)], ratio))


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
