"""Wanted shares become ranks: clipped, the excess spread again, the remainder spent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bs_exp.errors import ConfigError
from bs_exp.layout.plain import PlainLayout
from bs_exp.rank_budget import by_type, check_affordable, mean_over_layers, share_out, spread
from tests.support.spectra import group, problem

SHARE = st.floats(0.0, 1.0)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(
    entries=st.lists(st.tuples(st.floats(0.0, 50.0), st.floats(1.0, 1e6), SHARE, SHARE), min_size=1, max_size=8),
    position=SHARE,
)
def test_shares_are_proportional_between_their_bounds(
    entries: list[tuple[float, float, float, float]], position: float
) -> None:
    """The conditions that define the solution: bounds, total, and one factor for all that are not clipped."""
    wanted, sizes, one, other = (vector(*column) for column in zip(*entries, strict=True))
    low, high = torch.minimum(one, other), torch.maximum(one, other)
    least, most = float((sizes * low).sum()), float((sizes * high).sum())
    total = least + position * (most - least)
    shares = spread(wanted, sizes, low, high, total)
    assert bool((shares >= low).all()) and bool((shares <= high).all())
    assert float((sizes * shares).sum()) == pytest.approx(total, rel=1e-9, abs=1e-9)
    inside = (shares > low + 1e-9) & (shares < high - 1e-9)
    if float(wanted.max()) > 0.0 and int(inside.sum()) > 1 and float(wanted[inside].min()) > 1e-6:
        factors = shares[inside] / wanted[inside]
        assert float(factors.max()) == pytest.approx(float(factors.min()), rel=1e-6)


def test_a_dense_group_gives_its_excess_to_the_others() -> None:
    """4800 parameters, half kept: 3:1:1 would be 1440, 480, 480. By hand; nothing is clipped."""
    spectra = {group("q", layer): 1.0 for layer in range(3)}
    assert share_out(problem(spectra, 0.5), [3.0, 1.0, 1.0]) == [18, 6, 6]
    # 8:1:1 would be 1920 of 1600 for the first: dense, and 400 for each of the others, in components of 80.
    assert share_out(problem(spectra, 0.5), [8.0, 1.0, 1.0]) == [None, 5, 5]
    # At most 1560 are 19 components; the others share 840, and a component is left over for the first of them.
    assert share_out(problem(spectra, 0.5), [8.0, 1.0, 1.0], highest=0.975) == [19, 6, 5]


def test_a_poor_group_keeps_one_component_or_the_lower_bound() -> None:
    spectra = {group("q", layer): 1.0 for layer in range(3)}
    assert share_out(problem(spectra, 0.5), [0.0, 1.0, 1.0]) == [1, 15, 14]
    assert share_out(problem(spectra, 0.5), [0.0, 1.0, 1.0], lowest=0.2) == [4, 13, 13]
    assert share_out(problem(spectra, 0.5), [0.0, 0.0, 0.0]) == [10, 10, 10]


def test_removed_shares_are_in_proportion() -> None:
    """A quarter of 4800 removed, 1:2:3: 200, 400, 600; kept 17.5, 15 and 12.5 components of 80, in whole ones."""
    spectra = {group("q", layer): 1.0 for layer in range(3)}
    assert share_out(problem(spectra, 0.75), [1.0, 2.0, 3.0], removing=True) == [18, 15, 12]
    # Half removed, 1:1:8: the last would lose 1920 of 1600; it keeps 80, the others lose 440 each.
    assert share_out(problem(spectra, 0.5), [1.0, 1.0, 8.0], removing=True) == [15, 14, 1]


def test_pools_have_budgets_of_their_own() -> None:
    spectra = {group("q", 0): 1.0, group("q", 1): 1.0, group("o", 0): 1.0, group("o", 1): 1.0}
    wanted = [100.0, 300.0, 1.0, 1.0]
    assert share_out(problem(spectra, 0.5), wanted, pool=by_type) == [5, 15, 10, 10]
    assert share_out(problem(spectra, 0.5), wanted)[2:] == [1, 1]


def test_the_least_budget_is_named_with_its_pool() -> None:
    groups = (group("q", 0), group("o", 0, d_in=40, d_out=4))
    check_affordable(groups, 0.2, PlainLayout())
    with pytest.raises(ConfigError, match=r"below the 0\.2750 .* \(type o\) needs"):
        check_affordable(groups, 0.2, PlainLayout(), pool=by_type)
    with pytest.raises(ConfigError, match=r"min_ratio=0\.5 needs\. Raise retain_ratio or lower allocation\.min_ratio"):
        check_affordable(groups, 0.2, PlainLayout(), lowest=0.5)


def test_a_group_takes_the_mean_of_its_layers() -> None:
    assert mean_over_layers(group("q", 1, 2, 4), {0: 9.0, 1: 0.3, 2: 0.6, 4: 0.9}) == pytest.approx(0.6)
