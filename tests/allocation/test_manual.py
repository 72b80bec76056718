"""Shares as wanted: by layer, by a curve over depth, by type, and what the budget makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from bs_exp.allocation.manual import ManualAllocation
from bs_exp.allocation.uniform import UniformAllocation
from bs_exp.errors import ConfigError
from bs_exp.layout.plain import PlainLayout
from bs_exp.rank_budget import largest_rank, parameter_budget
from bs_exp.types import RankPlan
from tests.support.spectra import group, problem


def manual(**changes: Any) -> ManualAllocation:
    settings: dict[str, Any] = {"by_layer": None, "by_depth": None, "by_type": None, "min_ratio": 0.0, "max_ratio": 1.0}
    return ManualAllocation(**{**settings, **changes})


def shares(plan: RankPlan) -> list[float]:
    return [planned.parameters / planned.group.parameters for planned in plan.groups]


def blocks(number: int, size: int = 400) -> dict[Any, float]:
    return {group("q", layer, d_in=size, d_out=size): 0.5 for layer in range(number)}


# One component of 400 x 400 is 0.005 of its parameters.
NEAR = {"abs": 0.0051}


def test_shares_are_in_proportion_to_what_layers_want() -> None:
    """Mean 0.4 of shares 1 : 2 : 3 : 2 is 0.2, 0.4, 0.6, 0.4; the scale of the numbers does not matter."""
    case = problem(blocks(4), 0.4)
    plan = manual(by_layer=[1, 2, 3, 2]).allocate(case)
    assert shares(plan) == pytest.approx([0.2, 0.4, 0.6, 0.4], **NEAR)
    assert manual(by_layer=[10, 20, 30, 20]).allocate(case) == plan


def test_a_curve_goes_linearly_through_its_points() -> None:
    """Points 1, 3, 1 over five blocks are 1, 2, 3, 2, 1: their mean 1.8 is 0.36."""
    plan = manual(by_depth=(1.0, 3.0, 1.0)).allocate(problem(blocks(5), 0.36))
    assert shares(plan) == pytest.approx([0.2, 0.4, 0.6, 0.4, 0.2], **NEAR)
    assert manual(by_layer=[1, 2, 3, 2, 1]).allocate(problem(blocks(5), 0.36)) == plan


def test_as_many_points_as_blocks_are_the_blocks() -> None:
    values = [0.3, 1.7, 0.9, 1.1]
    case = problem(blocks(4), 0.45)
    assert manual(by_depth=values).allocate(case) == manual(by_layer=values).allocate(case)


def test_layers_depth_and_types_multiply() -> None:
    members = {group(m, layer, d_in=400, d_out=400): 0.5 for m in "qo" for layer in range(2)}
    plan = manual(by_layer=[1, 2], by_depth=[2, 1], by_type={"q": 3, "down": 9}).allocate(problem(members, 0.4))
    assert shares(plan) == pytest.approx([0.6, 0.6, 0.2, 0.2], **NEAR)


def test_a_shared_basis_takes_the_mean_of_its_layers() -> None:
    members = {group("q", 0, 1, d_in=400, d_out=400): 0.5, group("q", 2, 3, d_in=400, d_out=400): 0.5}
    plan = manual(by_layer=[1, 3, 1, 1]).allocate(problem(members, 0.45))
    assert shares(plan) == pytest.approx([0.6, 0.3], abs=0.004)  # one component is 1200 of 320,000


def test_equal_wants_are_the_uniform_plan() -> None:
    case = problem(blocks(3), 0.5)
    for even in (manual(), manual(by_depth=[2.0]), manual(by_layer=[5, 5, 5], by_type={"q": 0.1})):
        assert even.allocate(case) == UniformAllocation(fill=True).allocate(case)


def test_bounds_hold_and_the_rest_goes_to_the_others() -> None:
    plan = manual(by_layer=[0, 1, 1, 8], min_ratio=0.1, max_ratio=0.7).allocate(problem(blocks(4), 0.4))
    assert shares(plan) == pytest.approx([0.1, 0.4, 0.4, 0.7], **NEAR)
    assert max(shares(plan)) <= 0.7 and plan.retain_ratio <= 0.4


def test_what_wants_nothing_keeps_one_component() -> None:
    plan = manual(by_layer=[0, 1]).allocate(problem(blocks(2), 0.4))
    first, second = (planned.group for planned in plan.groups)
    left = parameter_budget(2 * first.parameters, 0.4) - 800
    assert [p.rank for p in plan.groups] == [1, largest_rank(second, left, PlainLayout())]


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        ({"by_layer": []}, r"^by_layer is empty"),
        ({"by_layer": [1, -0.5]}, r"^by_layer must hold finite numbers of at least 0, got -0.5 for 1"),
        ({"by_depth": [1, float("nan")]}, r"^by_depth must hold finite numbers"),
        ({"by_depth": [0, 0]}, r"^by_depth must hold a number above 0"),
        ({"by_depth": [True, 1]}, r"^by_depth must hold finite numbers.*got true"),
        ({"by_type": {"q": "much"}}, r"^by_type must hold finite numbers.*'much' for q"),
        ({"by_type": {"query": 1}}, r"^by_type names query, which is no matrix type\. Matrix types: q, k"),
        ({"min_ratio": -0.1}, r"^min_ratio"),
        ({"min_ratio": 0.5, "max_ratio": 0.4}, r"^max_ratio must be above 0.5"),
        ({"max_ratio": 1.1}, r"^max_ratio"),
    ],
)
def test_bad_numbers_are_refused(slip: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        manual(**slip)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by_layer": [1, 2, 3]}, r"by_layer must hold one number for each of the model's 4 blocks, got 3.*by_depth"),
        ({"by_type": {"q": 0.0, "o": 1.0}}, r"wants nothing anywhere.*matrix types q\)"),
        ({"min_ratio": 0.5}, r"min_ratio"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_there_are_spectra(
    settings: dict[str, Any], message: str
) -> None:
    groups = tuple(blocks(4))
    with pytest.raises(ConfigError, match=message):
        manual(**settings).check(groups, 0.4, PlainLayout())
