"""A search finds what is to be found, the same every time, however often it was stopped, and knows its own trials."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import optuna
import pytest

from bs_exp.allocation.bayesopt import BayesianSearch
from bs_exp.allocation.uniform import UniformAllocation
from bs_exp.allocation.water_filling import WaterFilling
from bs_exp.errors import BsExpError, CalibrationError, ConfigError, SearchError
from bs_exp.protocols import AllocationProblem, MeasuredAllocation
from bs_exp.testing.scores import FormulaScore, kept
from bs_exp.types import RankPlan, Statistic
from tests.support.searches import files_no_larger_than
from tests.support.spectra import group, problem

GROUPS = [group(matrix, layer, d_in=64, d_out=64) for matrix in ("q", "o") for layer in range(3)]
WANTED = {0: 0.7, 1: 0.3, 2: 0.5}


def distance(plan: RankPlan) -> float:
    """Zero where blocks keep 0.7, 0.3 and 0.5."""
    return sum((kept(p) - WANTED[p.group.layers[0]]) ** 2 for p in plan.groups)


def search(**dials: Any) -> BayesianSearch:
    settings: dict[str, Any] = {
        "trials": 8,
        "sampler": "tpe",
        "startup_trials": 4,
        "unit": "block",
        "objective": "kl",
        "num_windows": 4,
        "pruning": "none",
        "min_ratio": 0.2,
        "max_ratio": 1.0,
        "warm_starts": {"uniform": UniformAllocation(fill=True)},
        "seed": 0,
        "storage": None,
        "study_name": None,
    }
    return BayesianSearch(**{**settings, **dials})


def case(formula: Callable[[RankPlan], float] = distance, ratio: float = 0.5, **identity: Any) -> AllocationProblem:
    plain = problem({g: 0.5 + 0.5 * g.layers[0] for g in GROUPS}, ratio)
    score = FormulaScore(formula, {"model": "formula", "retain_ratio": ratio, **identity})
    return AllocationProblem(plain.spectra, ratio, plain.layout, score=score)


def measured(given: AllocationProblem) -> list[RankPlan]:
    assert isinstance(given.score, FormulaScore)
    return given.score.plans


def history(plan: RankPlan) -> list[float]:
    return [value for _, value in plan.search["history"]]


@pytest.mark.parametrize("sampler", ["gp", "tpe", "cmaes"])
def test_the_best_of_all_measured_plans_is_taken(sampler: str) -> None:
    given = case()
    plan = search(sampler=sampler, trials=7).allocate(given)
    values = [distance(other) for other in measured(given)]
    assert distance(plan) == min(values) == plan.search["best_value"] < values[0]
    assert plan.search["plans"] == len({tuple(p.rank for p in other.groups) for other in measured(given)}) == 7
    assert history(plan) == values
    assert 0 <= 0.5 * plan.dense_parameters - plan.parameters < 128


def test_a_gaussian_process_comes_near_the_optimum() -> None:
    plan = search(sampler="gp", trials=16, startup_trials=6).allocate(case())
    shares = {p.group.layers[0]: kept(p) for p in plan.groups}
    assert shares == pytest.approx(WANTED, abs=0.1)
    assert plan.search["best_value"] < 0.1 * plan.search["warm_starts"]["uniform"]


def test_warm_starts_come_first_and_are_never_lost() -> None:
    starts = {"uniform": UniformAllocation(fill=True), "filled": WaterFilling(min_ratio=0.2)}
    given = case()
    plan = search(warm_starts=starts).allocate(given)
    first, second = measured(given)[:2]
    assert [p.rank for p in first.groups] == [p.rank for p in UniformAllocation(fill=True).allocate(given).groups]
    assert plan.search["warm_starts"] == {"uniform": distance(first), "filled": distance(second)}
    assert plan.search["best_value"] <= min(plan.search["warm_starts"].values())
    assert search(warm_starts={}, trials=2).allocate(case()).search["warm_starts"] == {}


@pytest.mark.parametrize("sampler", ["gp", "tpe", "cmaes"])
def test_same_seed_same_search(sampler: str) -> None:
    one, other = (search(sampler=sampler, trials=6).allocate(case()) for _ in range(2))
    assert one == other and one.search == other.search
    assert search(sampler=sampler, trials=6, seed=1).allocate(case()).search["history"] != one.search["history"]


@pytest.mark.parametrize("unit", ["block", "matrix"])
def test_one_number_per_block_or_per_group(unit: str) -> None:
    members = [group("q", 0, 1, d_in=64, d_out=64), *GROUPS[3:]]
    plain = problem(dict.fromkeys(members, 1.0), 0.5)
    score = FormulaScore(distance)
    plan = search(unit=unit, warm_starts={}, trials=3).allocate(
        AllocationProblem(plain.spectra, 0.5, plain.layout, score=score)
    )
    names = {"block": ["layer 0", "layer 1", "layer 2"], "matrix": ["q[0,1]", "o[0]", "o[1]", "o[2]"]}[unit]
    shares = plan.search["shares"]
    assert sorted(shares) == sorted(names)
    if unit == "block":  # all groups of a block in proportion, a shared one to the mean of its layers
        whole = shares["layer 2"] / kept(plan.groups[-1])
        assert kept(plan.groups[0]) * whole == pytest.approx((shares["layer 0"] + shares["layer 1"]) / 2, abs=0.05)


def test_bounds() -> None:
    plan = search(min_ratio=0.4, max_ratio=0.6, trials=20).allocate(case())
    assert all(0.35 < kept(p) <= 0.6 for p in plan.groups)
    with pytest.raises(ConfigError, match=r"retain_ratio 0\.3 .*allocation\.min_ratio=0\.4"):
        search(min_ratio=0.4).check(tuple(GROUPS), 0.3, case().layout)


def test_a_stopped_search_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = search(trials=10).allocate(case())
    place = str(tmp_path / "studies" / "search.log")
    search(trials=4, storage=place).allocate(case())
    rest = case()
    resumed = search(trials=10, storage=place).allocate(rest)
    assert len(measured(rest)) == 6
    assert resumed == whole and resumed.search == whole.search
    again = case()
    assert search(trials=10, storage=place).allocate(again) == whole and measured(again) == []


def test_a_trial_that_was_interrupted_is_tried_again(tmp_path: Path) -> None:
    def stops_at(limit: int) -> AllocationProblem:
        def formula(plan: RankPlan) -> float:
            if len(measured(given)) > limit:
                raise KeyboardInterrupt
            return distance(plan)

        given = case(formula)
        return given

    place = str(tmp_path / "search.log")
    for limit in (0, 3):  # the warm start first, then some proposal
        with pytest.raises(KeyboardInterrupt):
            search(storage=place).allocate(stops_at(limit))
    resumed = search(storage=place).allocate(case())
    assert history(resumed) == history(search().allocate(case()))


@pytest.mark.parametrize("storage", ["{}/search.log", pytest.param("sqlite:///{}/search.db", marks=pytest.mark.slow)])
def test_workers_share_a_search(tmp_path: Path, storage: str) -> None:
    place, found, cases = storage.format(tmp_path), [], [case(), case(), case()]
    search(trials=1, storage=place).allocate(cases[0])
    workers = [
        Thread(target=lambda given=given: found.append(search(trials=9, storage=place).allocate(given)))
        for given in cases[1:]
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    # Whoever measures the last plan, the other one may be at work on another.
    plans = [plan for given in cases for plan in measured(given)]
    assert 9 <= len(plans) <= 10
    assert min(plan.search["best_value"] for plan in found) == min(map(distance, plans))


def test_a_study_of_another_search_is_refused_and_what_differs_is_said(tmp_path: Path) -> None:
    mine = search(trials=2, storage=str(tmp_path / "search.log"), study_name="mine")
    given = case()
    mine.allocate(given)
    for other, message in (
        (case(ratio=0.6), r"retain_ratio: 0\.5 in the study, 0\.6 here"),
        (case(model="another"), r"model: formula in the study, another here"),
    ):
        assert other.score is not None
        with pytest.raises(ConfigError, match=message):
            mine.check_search(other.score.identity)
        with pytest.raises(ConfigError, match=r"'mine' belongs to another search(.|\n)*Set another .*study_name"):
            mine.allocate(other)
        assert measured(other) == []
    with pytest.raises(ConfigError, match=r"objective: kl in the study, cosine here"):
        search(trials=2, storage=mine.storage, study_name="mine", objective="cosine").allocate(case())
    assert given.score is not None
    mine.check_search(given.score.identity)
    # Without a name, every search finds its own.
    unnamed = search(trials=2, storage=mine.storage)
    assert unnamed.allocate(case(ratio=0.6)).search["plans"] == 2


def test_a_study_that_others_made_is_refused(tmp_path: Path) -> None:
    place = f"sqlite:///{tmp_path}/other.db"
    study = optuna.create_study(study_name="theirs", storage=place)
    study.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(ConfigError, match=r"'theirs' was not made by allocation=bayesopt"):
        search(storage=place, study_name="theirs").allocate(case())


def test_every_round_of_a_schedule_is_a_search_of_its_own(tmp_path: Path) -> None:
    named = search(trials=2, storage=str(tmp_path / "search.log"), study_name="rounds")
    for kept_before in (1.0, 0.8, 0.65):
        given = case(kept=kept_before)
        named.allocate(given)
        assert len(measured(given)) == 2


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("{}/file/search.log", r"allocation\.storage: .* cannot be made.*Give another place"),
        ("{}/file", r"allocation\.storage=.* is a file, but no journal of a study\. Give a new file"),
        ("nosuch://host/name", r"allocation\.storage is no URL of a database"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_refused_before_any_work(tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "file").write_text("no journal\nat all\n")
    with pytest.raises(BsExpError, match=message):
        search(storage=place.format(tmp_path)).check_search({"model": "formula"})


def test_a_journal_whose_writer_was_killed_is_read_on(tmp_path: Path) -> None:
    place = tmp_path / "search.log"
    search(trials=3, storage=str(place)).allocate(case())
    whole = place.read_bytes()
    place.write_bytes(whole[:-9])
    assert search(trials=5, storage=str(place)).allocate(case()).search["plans"] == 5


def test_a_full_disk_is_an_error_that_says_so_and_the_search_goes_on(tmp_path: Path) -> None:
    place = tmp_path / "search.log"
    search(trials=3, storage=str(place)).allocate(case())
    size = place.stat().st_size
    with files_no_larger_than(size + 300), pytest.raises(SearchError, match=r"search\.log does not answer .*large"):
        search(trials=5, storage=str(place)).allocate(case())
    assert search(trials=5, storage=str(place)).allocate(case()).search["plans"] == 5


def test_median_pruning_ends_bad_trials_early() -> None:
    given = case()
    plan = search(pruning="median", sampler="tpe", startup_trials=20, trials=25).allocate(given)
    assert isinstance(given.score, FormulaScore)
    pruned = plan.search["proposals"]["pruned"]
    assert pruned > 0 and given.score.batches == 2 * len(measured(given)) - pruned
    assert plan.search["best_value"] == min(value for value in history(plan) if value is not None)


def test_plans_without_finite_outputs_are_never_taken() -> None:
    def broken_above(limit: float) -> Callable[[RankPlan], float]:
        return lambda plan: distance(plan) if kept(plan.groups[0]) <= limit else float("inf")

    plan = search(trials=10).allocate(case(broken_above(0.55)))
    assert kept(plan.groups[0]) <= 0.55 and plan.search["proposals"]["pruned"] > 0
    with pytest.raises(CalibrationError, match=r"None of the .* plans .* finite outputs.*Raise retain_ratio"):
        search(trials=3).allocate(case(broken_above(0.0)))


def test_points_that_mean_one_plan_cost_one_measurement() -> None:
    """One block: every point is the uniform plan."""
    plain = problem({group("q", 0, d_in=64, d_out=64): 1.0}, 0.5)
    score = FormulaScore(lambda plan: 1.0)
    plan = search(trials=5, warm_starts={}).allocate(AllocationProblem(plain.spectra, 0.5, plain.layout, score=score))
    assert plan.search["plans"] == 1 and plan.search["proposals"]["complete"] == 10


def test_warm_starts_say_what_they_need() -> None:
    class Curious(UniformAllocation):
        needs = frozenset({Statistic.SENSITIVITY})

    assert search(warm_starts={}).needs == frozenset()
    assert search(warm_starts={"one": UniformAllocation(), "two": Curious()}).needs == {Statistic.SENSITIVITY}
    assert isinstance(search(), MeasuredAllocation) and not isinstance(UniformAllocation(), MeasuredAllocation)


def test_without_a_score_there_is_no_search() -> None:
    with pytest.raises(ValueError, match="needs a score"):
        search().allocate(problem(dict.fromkeys(GROUPS, 1.0), 0.5))


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"trials": 0}, "trials must be a whole number of at least 1, got 0"),
        ({"sampler": "grid"}, "sampler must be one of gp, tpe, cmaes, got 'grid'"),
        ({"unit": "head"}, "unit must be one of block, matrix"),
        ({"objective": "bleu"}, "objective must be one of cosine, perplexity, kl"),
        ({"num_windows": 0}, "num_windows must be a whole number of at least 1"),
        ({"pruning": "hard"}, "pruning must be one of none, median"),
        ({"min_ratio": 0.8, "max_ratio": 0.5}, r"0 < min_ratio < max_ratio <= 1, got 0\.8 and 0\.5"),
        ({"min_ratio": 0.0}, r"0 < min_ratio"),
        ({"study_name": "mine"}, "study_name 'mine' .* storage is null.*Set allocation.storage"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
    ],
)
def test_settings_out_of_range(dials: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(**dials)
