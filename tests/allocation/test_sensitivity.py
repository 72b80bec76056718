"""The most harmless truncations win, as few as the budget needs; the oracle tries every cut."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bs_exp.allocation.sensitivity import SensitivitySearch
from bs_exp.errors import ConfigError
from bs_exp.layout.plain import PlainLayout
from bs_exp.protocols import AllocationProblem, MeasuredAllocation
from bs_exp.rank_budget import largest_rank, parameter_budget
from bs_exp.testing.scores import FormulaScore, kept
from bs_exp.types import RankPlan, WeightGroup
from tests.support.spectra import group, problem

GROUPS = [group(matrix, layer, d_in=64, d_out=64) for matrix in ("q", "o") for layer in range(2)]


def sensitivity(**dials: Any) -> SensitivitySearch:
    settings: dict[str, Any] = {
        "ratios": (0.25, 0.5, 0.75),
        "unit": "matrix",
        "objective": "perplexity",
        "num_windows": 4,
    }
    return SensitivitySearch(**{**settings, **dials})


def case(formula: Any, ratio: float, members: list[WeightGroup] = GROUPS) -> AllocationProblem:
    plain = problem(dict.fromkeys(members, 1.0), ratio)
    return AllocationProblem(plain.spectra, ratio, plain.layout, score=FormulaScore(formula))


def plans(given: AllocationProblem) -> list[RankPlan]:
    assert isinstance(given.score, FormulaScore)
    return given.score.plans


def truncated(plan: RankPlan) -> list[tuple[str, int]]:
    return [(p.group.name, p.rank) for p in plan.groups if p.rank is not None]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), ratio=st.floats(0.3, 0.99))
def test_the_cut_is_the_first_one_that_meets_the_budget(seed: int, ratio: float) -> None:
    """Oracle: cuts are tried one by one, with ranks from the closed form."""
    draw = random.Random(seed)
    ranks = [int(r * 64 * 64 / 128) for r in (0.25, 0.5, 0.75)]
    table = {(g.name, rank): draw.random() for g in GROUPS for rank in ranks}
    given_case = case(lambda plan: sum(table[entry] for entry in truncated(plan)), ratio)
    found = sensitivity().allocate(given_case)
    budget = int(ratio * 4 * 64 * 64)
    chosen = {g.name: 64 * 64 for g in GROUPS}
    last = None
    for name, rank in sorted(table, key=table.__getitem__):
        if sum(chosen.values()) <= budget:
            break
        chosen[name] = min(chosen[name], rank * 128)
        last = table[name, rank]
    assert found.search["cut_value"] == last
    # One plan per group and ratio, and the dense one; each with one truncation at most.
    assert len(plans(given_case)) == 13 and all(len(truncated(plan)) <= 1 for plan in plans(given_case))
    for planned in found.groups:
        assert planned.parameters >= chosen[planned.group.name]
    assert sum(chosen.values()) <= found.parameters <= budget
    assert min(128, budget - found.parameters + 1) > budget - found.parameters


def test_what_nobody_misses_goes_first_and_the_rest_is_dense() -> None:
    idle = GROUPS[2].name
    plan = sensitivity().allocate(case(lambda p: sum(name != idle for name, _ in truncated(p)), 0.9))
    assert [p.rank is None for p in plan.groups] == [True, True, False, True]
    assert 0.9 * plan.dense_parameters - plan.parameters < 128


def test_what_is_left_goes_where_most_is_won() -> None:
    """All are cut to a half at once; the remainder, two components, goes where the measured curve is steepest."""
    steep = GROUPS[1].name

    def formula(plan: RankPlan) -> float:
        return sum((5.0 if p.group.name == steep else 1.0) * (1.0 - kept(p)) for p in plan.groups)

    plan = sensitivity(ratios=(0.5,)).allocate(case(formula, 0.52))
    ranks = {p.group.name: p.rank for p in plan.groups}
    assert ranks == {g.name: 18 if g.name == steep else 16 for g in GROUPS}


def test_outputs_that_are_not_finite_come_last() -> None:
    fragile = GROUPS[0].name
    plan = sensitivity().allocate(
        case(
            lambda p: float("inf") if any(name == fragile for name, _ in truncated(p)) else float(len(truncated(p))),
            0.5,
        )
    )
    assert plan.groups[0].rank is None


def test_blocks_are_truncated_whole_and_shared_bases_join_them() -> None:
    pair = group("k", 1, 2, d_in=64, d_out=64)
    members = [group("q", layer, d_in=64, d_out=64) for layer in range(4)] + [pair]
    given_case = case(lambda plan: float(len(truncated(plan))), 0.6, members)
    plan = sensitivity(unit="block", ratios=(0.3, 0.6)).allocate(given_case)
    together = {frozenset(name for name, _ in truncated(p)) for p in plans(given_case)}
    assert together == {
        frozenset(),
        frozenset({"q[0]"}),
        frozenset({"q[1]", "q[2]", "k[1,2]"}),
        frozenset({"q[3]"}),
    }
    assert len(plans(given_case)) == 1 + 3 * 2
    assert plan.parameters <= 0.6 * plan.dense_parameters


def test_ranks_are_those_of_the_ratios() -> None:
    given_case = case(lambda plan: 0.0, 0.5)
    sensitivity(ratios=(0.33,)).allocate(given_case)
    wanted = largest_rank(GROUPS[0], parameter_budget(GROUPS[0].parameters, 0.33), PlainLayout())
    assert {rank for plan in plans(given_case) for _, rank in truncated(plan)} == {wanted}


def test_a_budget_below_the_smallest_ratio_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"retain_ratio 0\.2 is below 0\.25, the smallest of allocation\.ratios"):
        sensitivity().check(tuple(GROUPS), 0.2, PlainLayout())
    with pytest.raises(ValueError, match="needs a score"):
        sensitivity().allocate(problem(dict.fromkeys(GROUPS, 1.0), 0.5))


def test_it_is_measured() -> None:
    assert isinstance(sensitivity(), MeasuredAllocation)
    assert sensitivity().measured_by.objective == "perplexity"


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"ratios": ()}, r"ratios must be shares above 0 and below 1, at least one, got \[\]"),
        ({"ratios": (0.5, 1.0)}, r"ratios must be shares .* got \[0\.5, 1\.0\]"),
        ({"unit": "head"}, "unit must be one of matrix, block"),
        ({"objective": "bleu"}, "objective must be one of cosine, perplexity, kl"),
        ({"num_windows": 0}, "num_windows must be a whole number of at least 1"),
    ],
)
def test_settings_out_of_range(dials: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sensitivity(**dials)
