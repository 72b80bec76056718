"""What every allocator keeps: the budget, the bounds, the order of the groups, and its word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bs_exp.errors import ConfigError
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.protocols import Allocation, AllocationProblem, Layout
from bs_exp.rank_budget import parameter_budget
from bs_exp.testing.scores import FormulaScore
from bs_exp.types import LayerProfile, Spectrum, WeightGroup

LAYOUTS: list[Layout] = [PlainLayout(), PivotedLayout()]
IN_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
GROUPS = st.lists(
    st.builds(
        lambda size, d_in, d_out, first: WeightGroup("q", tuple(range(first, first + size)), d_in, d_out),
        st.integers(1, 4), st.integers(8, 64), st.integers(8, 64), st.integers(0, 9),
    ),
    min_size=1, max_size=8, unique_by=lambda g: g.layers[0],
)  # fmt: skip
# A suite runs for several subclasses, with a strategy that does not change between examples.
_SHARED = [HealthCheck.differing_executors, HealthCheck.function_scoped_fixture]


class AllocationContract:
    """Subclass it as `TestMine`, with a fixture `allocation` that returns the strategy.

    `refusal` is what its message for a budget that no plan meets must match.
    """

    refusal: ClassVar[str] = "retain_ratio"

    @pytest.fixture(scope="class")
    @classmethod
    def allocation(cls) -> Allocation:
        """The strategy."""
        raise NotImplementedError("override the fixture `allocation`: it returns the strategy.")

    @IN_LAYOUTS
    @settings(max_examples=40, deadline=None, suppress_health_check=_SHARED)
    @given(groups=GROUPS, ratio=st.floats(0.35, 1.0))
    def test_within_budget_and_bounds(
        self, allocation: Allocation, layout: Layout, groups: list[WeightGroup], ratio: float
    ) -> None:
        case = problem(groups, ratio, layout)
        plan = allocation.allocate(case)
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
        assert allocation.allocate(case) == plan

    def test_a_budget_that_no_plan_meets_is_refused_before_there_are_spectra(self, allocation: Allocation) -> None:
        groups = (WeightGroup("q", (0,), 16, 16), WeightGroup("q", (1,), 16, 16))
        allocation.check(groups, 0.5, PlainLayout())
        with pytest.raises(ConfigError, match=self.refusal):
            allocation.check(groups, 0.11, PlainLayout())
        with pytest.raises(ConfigError, match=r"retain_ratio 0\.11 "):
            allocation.allocate(problem(groups, 0.11))

    def test_everything_kept_is_dense(self, allocation: Allocation) -> None:
        plan = allocation.allocate(problem([WeightGroup("q", (0, 1), 16, 16)], 1.0))
        assert plan.groups[0].rank is None and plan.retain_ratio == 1.0

    @pytest.mark.parametrize("ratio", [0.0, -0.2, 1.0001, float("nan")])
    def test_ratio_out_of_range(self, allocation: Allocation, ratio: float) -> None:
        with pytest.raises(ConfigError, match=r"above 0 and at most 1.*got"):
            allocation.allocate(problem([WeightGroup("q", (0,), 16, 16)], ratio))


class SpendingContract:
    """For allocators that spend the budget up to less than one component, besides `AllocationContract`."""

    @pytest.fixture(scope="class")
    @classmethod
    def allocation(cls) -> Allocation:
        """The strategy."""
        raise NotImplementedError("override the fixture `allocation`: it returns the strategy.")

    @IN_LAYOUTS
    @settings(max_examples=40, deadline=None, suppress_health_check=_SHARED)
    @given(groups=GROUPS, ratio=st.floats(0.35, 1.0))
    def test_what_is_left_is_less_than_one_component(
        self, allocation: Allocation, layout: Layout, groups: list[WeightGroup], ratio: float
    ) -> None:
        plan = allocation.allocate(problem(groups, ratio, layout))
        left = parameter_budget(plan.dense_parameters, ratio) - plan.parameters
        for planned in plan.groups:
            if planned.rank is not None:  # the next component, or, past break-even, the dense matrices
                dearer = layout.parameters(planned.group, planned.rank + 1)
                assert 0 <= left < min(dearer, planned.group.parameters) - planned.parameters


def spectrum(group: WeightGroup, seed: int = 0) -> Spectrum:
    """A random falling spectrum, in the unit of a norm, with first-order changes of both signs."""
    generator = torch.Generator().manual_seed(seed)
    # Above 1, as norms over many tokens are.
    values = 1.0 + 99.0 * torch.rand(group.full_rank, generator=generator, dtype=torch.float64) ** 2
    values = values.sort(descending=True).values
    first_order = 0.01 * torch.randn(group.full_rank, generator=generator, dtype=torch.float64)
    return Spectrum(group=group, singular_values=values, energies=values.square(), ridge=0.0, first_order=first_order)


def problem(groups: Sequence[WeightGroup], ratio: float, layout: Layout = LAYOUTS[0]) -> AllocationProblem:
    """The groups with random spectra and a random profile; scores are the predicted losses."""
    spectra = tuple(spectrum(g, seed) for seed, g in enumerate(groups))
    profile = random_profile(1 + max(layer for g in groups for layer in g.layers))
    return AllocationProblem(spectra, ratio, layout, profile, FormulaScore(lambda plan: plan.predicted_loss))


def random_profile(layers: int) -> LayerProfile:
    """Sensitivities and output spectra of so many blocks."""
    generator = torch.Generator().manual_seed(layers)
    values = torch.rand(layers, 32, generator=generator, dtype=torch.float64) ** 4
    return LayerProfile(
        sensitivity=0.1 + torch.rand(layers, generator=generator, dtype=torch.float64),
        output_singular_values=dict(enumerate(values.sort(descending=True).values)),
    )
