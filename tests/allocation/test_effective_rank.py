"""D-Rank: the closed form within a type, and the shift from q and k to v."""

from __future__ import annotations

import math

import pytest
import torch

from bs_exp.allocation.effective_rank import EffectiveRank, density
from bs_exp.errors import ConfigError
from bs_exp.types import Spectrum
from tests.support.spectra import decaying, group, problem


def entropy_rank(values: list[float]) -> float:
    squares = [v * v for v in values]
    shares = [s / sum(squares) for s in squares]
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    flat = decaying(group("q", 0), 0.0)
    assert density(flat) == pytest.approx(40.0)
    values = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    some = Spectrum(group=group("q", 0, d_in=4), singular_values=values, energies=values.square(), ridge=0.0)
    assert density(some) == pytest.approx(entropy_rank([3.0, 2.0, 1.0, 0.0]))


def test_ranks_follow_the_closed_form_within_a_type() -> None:
    """Groups of several sizes, none clipped; rounding moves a rank by less than 1 down and at most 1 up."""
    exponents = {
        group("q", 0, 1, d_in=200, d_out=160): 1.0, group("q", 2, 3, d_in=200, d_out=160): 0.7,
        group("q", 4, d_in=200, d_out=160): 0.9, group("o", 0, d_in=160, d_out=200): 0.6,
        group("o", 1, d_in=160, d_out=200): 1.2,
    }  # fmt: skip
    case = problem(exponents, 0.4)
    plan = EffectiveRank(beta=0.0).allocate(case)
    for matrix in ("q", "o"):
        members = [s for s in case.spectra if s.group.matrix == matrix]
        budget = 0.4 * sum(s.group.parameters for s in members)
        omega = {s.group: s.group.d_in + s.group.columns for s in members}
        rank = {s.group: entropy_rank(s.singular_values.tolist()) for s in members}
        for planned in plan.groups:
            if planned.group.matrix == matrix:
                g = planned.group
                exact = budget * math.sqrt(rank[g] / omega[g]) / sum(math.sqrt(rank[o] * omega[o]) for o in omega)
                assert planned.rank is not None and exact - 1 < planned.rank <= exact + 1


def test_a_share_of_q_and_k_moves_to_v() -> None:
    """Equal shapes and spectra: uniform rank 100 of 400 x 400 at 0.5; q and k give 30 each, v takes 60."""
    members = {group(m, layer, d_in=400, d_out=400): 0.5 for m in "qkvo" for layer in range(2)}
    plan = EffectiveRank(beta=0.3).allocate(problem(members, 0.5))
    ranks = {(p.group.matrix, p.group.layers[0]): p.rank for p in plan.groups}
    assert ranks == {(m, layer): {"q": 70, "k": 70, "v": 160, "o": 100}[m] for m in "qkvo" for layer in range(2)}


def test_what_v_cannot_hold_stays_with_q_and_k() -> None:
    """At 0.8 v would get 1.28 of its parameters: dense, and q and k share 1.4 of their 2."""
    members = {group(m, 0, d_in=400, d_out=400): 0.5 for m in ("q", "k", "v", "up")}
    plan = EffectiveRank(beta=0.3).allocate(problem(members, 0.8))
    assert [p.rank for p in plan.groups] == [140, 140, None, 160]


def test_a_model_without_v_says_so_before_any_work() -> None:
    groups = (group("qkv", 0), group("o", 0))
    with pytest.raises(ConfigError, match=r"beta=0\.3 .* matrix types are o qkv\. Set allocation\.beta=0"):
        EffectiveRank(beta=0.3).check(groups, 0.8, problem([], 0.8).layout)
    EffectiveRank(beta=0.0).check(groups, 0.8, problem([], 0.8).layout)


@pytest.mark.parametrize("beta", [-0.1, 1.0])
def test_beta_out_of_range(beta: float) -> None:
    with pytest.raises(ConfigError, match="beta must be at least 0 and below 1"):
        EffectiveRank(beta=beta)
