"""Allocations that measure, in the pipeline: real scores, in every round, and bad requests fail before any work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bs_exp.allocation.bayesopt import BayesianSearch
from bs_exp.allocation.sensitivity import SensitivitySearch
from bs_exp.allocation.uniform import UniformAllocation
from bs_exp.cache import Cache
from bs_exp.errors import ConfigError
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress, prepare
from bs_exp.plan_score import Comparison
from bs_exp.progress import Progress
from bs_exp.protocols import PlanObjective
from bs_exp.records.record import read_record
from bs_exp.schedule.adaptive_steps import AdaptiveSteps
from bs_exp.schedule.steps import EqualSteps
from bs_exp.sharing.none import NoSharing
from bs_exp.types import CalibrationData
from bs_exp.whitening.identity import IdentityWhitening
from bs_exp.workspace import Workspace
from tests.support.recipes import RECIPE, RandomTokens

Cli = Callable[..., Any]
Tiny = tuple[str, ...]


def search(**dials: Any) -> BayesianSearch:
    settings: dict[str, Any] = {
        "trials": 4,
        "sampler": "tpe",
        "startup_trials": 4,
        "unit": "block",
        "objective": "kl",
        "num_windows": 8,
        "pruning": "none",
        "min_ratio": 0.2,
        "max_ratio": 1.0,
        "warm_starts": {"uniform": UniformAllocation(fill=True)},
        "seed": 0,
        "storage": None,
        "study_name": None,
    }
    return BayesianSearch(**{**settings, **dials})


SENSITIVITY = SensitivitySearch(ratios=(0.4, 0.7), unit="block", objective="perplexity", num_windows=8)


@pytest.mark.parametrize("sharing", [RECIPE.sharing, NoSharing()], ids=repr)
def test_the_model_scores_what_the_search_says(sharing: Any) -> None:
    dense, cache = tiny_random(), Cache(None)
    recipe = replace(RECIPE, sharing=sharing, allocation=search())
    made = compress(dense, recipe, Workspace(cache, Progress(quiet=True)))
    data = CalibrationData(recipe.calibration.windows(dense.tokenizer), batch_size=8)
    judge = Comparison(dense=dense, data=data, objective=PlanObjective(objective="kl", num_windows=8))
    assert judge.measure(made.module) == pytest.approx(made.plan.search["best_value"], rel=1e-4)
    uniform = replace(recipe, allocation=UniformAllocation(fill=True))
    assert judge.measure(compress(dense, uniform, Workspace(cache, Progress(quiet=True))).module) == pytest.approx(
        made.plan.search["warm_starts"]["uniform"], rel=1e-4
    )
    assert made.plan.retain_ratio <= 0.6


@pytest.mark.parametrize("allocation", [search(), SENSITIVITY], ids=["bayesopt", "sensitivity"])
def test_a_repeated_search_measures_nothing_again(tmp_path: Path, allocation: Any) -> None:
    dense, recipe = tiny_random(), replace(RECIPE, allocation=allocation)
    made = compress(dense, recipe, Workspace(Cache(tmp_path), Progress(quiet=True)))
    again = Cache(tmp_path)
    assert compress(dense, recipe, Workspace(again, Progress(quiet=True))).plan == made.plan
    assert again.misses == {} and again.hits["score"] > 0


def test_plain_svd_is_searched_too() -> None:
    """No statistics are needed, but windows to measure on are."""
    recipe = replace(RECIPE, whitening=IdentityWhitening(), allocation=search())
    progress = Progress(quiet=True)
    made = compress(tiny_random(), recipe, Workspace(Cache(None), progress))
    assert made.plan.search["plans"] == 4 and "calibrate" not in progress.timings
    assert made.calibration["sha256"] == "random-0-24"


def test_every_round_is_searched_on_its_own_decompositions() -> None:
    cache = Cache(None)
    recipe = replace(RECIPE, allocation=search(), schedule=EqualSteps(size=0.2))
    made = compress(tiny_random(), recipe, Workspace(cache, Progress(quiet=True)))
    assert made.rounds == (0.8, 0.6)
    assert (cache.hits["score"], cache.misses["score"]) == (0, 2 * 4)
    assert made.plan.requested_ratio == 0.6 and made.plan.search["plans"] == 4


def test_a_schedule_that_asks_for_predictions_starts_no_search() -> None:
    cache = Cache(None)
    steps = AdaptiveSteps(max_loss=50.0, min_size=0.05, max_size=0.3)
    made = compress(
        tiny_random(), replace(RECIPE, allocation=search(), schedule=steps), Workspace(cache, Progress(quiet=True))
    )
    assert made.rounds[-1] == 0.6 and len(made.rounds) > 1
    assert cache.misses["score"] + cache.hits["score"] == 4 * len(made.rounds)


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        (search(num_windows=25), r"num_windows must be at most .*24, got 25"),
        (search(min_ratio=0.7), r"retain_ratio 0\.6 is below .* allocation\.min_ratio=0\.7"),
        (replace(SENSITIVITY, ratios=(0.7,)), r"retain_ratio 0\.6 is below 0\.7, the smallest of allocation\.ratios"),
        (search(storage="nosuch://place"), r"allocation\.storage is no URL of a database"),
    ],
)
def test_requests_that_cannot_be_served_fail_before_any_work(allocation: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(tiny_random(), replace(RECIPE, allocation=allocation), Progress(quiet=True))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"retain_ratio": 0.5}, r"retain_ratio: 0\.6 in the study, 0\.5 here"),
        ({"calibration": RandomTokens(seed=1)}, "windows: random-0-24 in the study, random-1-24 here"),
        ({"whitening": IdentityWhitening()}, r"whitening: GramWhitening\(.*in the study, IdentityWhitening"),
        ({"sharing": NoSharing()}, r"sharing: AdjacentSharing\("),
    ],
)
def test_a_study_of_other_scores_is_refused_before_any_work(
    tmp_path: Path, change: dict[str, Any], difference: str
) -> None:
    mine = search(storage=str(tmp_path / "search.log"), study_name="mine", trials=1)
    recipe = replace(RECIPE, allocation=mine)
    compress(tiny_random(), recipe, Workspace(Cache(None), Progress(quiet=True)))
    prepare(tiny_random(), recipe, Progress(quiet=True))
    with pytest.raises(ConfigError, match=difference):
        prepare(tiny_random(), replace(recipe, **change), Progress(quiet=True))


def test_a_study_of_another_model_is_refused_before_any_work(tmp_path: Path) -> None:
    recipe = replace(RECIPE, allocation=search(storage=str(tmp_path / "s.log"), study_name="mine", trials=1))
    compress(tiny_random(), recipe, Workspace(Cache(None), Progress(quiet=True)))
    with pytest.raises(
        ConfigError,
        match=r"What differs:\n  model: \w+ in the study, \w+ here\nSet these as they were .* Set another allocation",
    ):
        prepare(tiny_random(seed=1), recipe, Progress(quiet=True))


@pytest.mark.slow
def test_a_run_records_its_search_and_another_goes_on_with_it(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    dials = (
        *("experiment=dipsvd_bayesopt", "allocation.num_windows=2", "allocation.storage=search.log"),
        *("allocation.study_name=mine", "allocation.startup_trials=2"),
    )
    assert cli(*tiny, *dials, "allocation.trials=3", "hydra.run.dir=one").status == 0
    done = cli(*tiny, *dials, "allocation.trials=5", "hydra.run.dir=two")
    assert done.status == 0, done.err
    first, second = (read_record(tmp_path / name).plan["search"] for name in ("one", "two"))  # type: ignore[index]
    assert second["history"][: len(first["history"])] == first["history"]
    assert (first["plans"], second["plans"]) == (3, 5)
    assert second["best_value"] <= min(second["warm_starts"].values())
    refused = cli(*tiny, *dials, "retain_ratio=0.7", "hydra.run.dir=three")
    assert refused.status == 1
    assert "retain_ratio: 0.8 in the study, 0.7 here" in refused.err
    assert "calibrate" not in read_record(tmp_path / "three").timings
