"""The better candidate wins on windows that nobody has seen, candidates share their work, and the record says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bs_exp.allocation.sensitivity import SensitivitySearch
from bs_exp.cache import Cache
from bs_exp.errors import CalibrationError, ConfigError, DataError
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import Recipe, compress, prepare
from bs_exp.progress import Progress
from bs_exp.records.record import read_record
from bs_exp.runs.recipe_selection import check_candidates, select
from bs_exp.schedule.steps import EqualSteps
from bs_exp.selection.measured import MeasuredSelection
from bs_exp.sharing.adjacent import AdjacentSharing
from bs_exp.sharing.none import NoSharing
from bs_exp.types import CompressedModel, LoadedModel, TokenWindows
from bs_exp.update.none import NoUpdate
from bs_exp.whitening.identity import IdentityWhitening
from bs_exp.workspace import Workspace
from tests.support.recipes import RECIPE, RandomTokens

Cli = Callable[..., Any]
Tiny = tuple[str, ...]
WINDOWS = RECIPE.calibration.windows(None)
GROUPINGS: dict[str, dict[str, Any]] = {"pairs": {}, "private": {"sharing": NoSharing()}}
METRICS: dict[str, dict[str, Any]] = {
    "plain": {"whitening": IdentityWhitening()},
    "gram": {},
    "pivoted": {"layout": PivotedLayout()},
}


def measured(candidates: Mapping[str, Mapping[str, Any]] = GROUPINGS, **dials: Any) -> MeasuredSelection:
    settings: dict[str, Any] = {
        "objective": "kl",
        "holdout": 0.25,
        "rounds": "single",
        "recalibrate": True,
        "seed": 0,
    }
    return MeasuredSelection(candidates=candidates, **{**settings, **dials})


QUIET = Progress(quiet=True)


def on_windows(dense: LoadedModel, recipe: Recipe, windows: TokenWindows, cache: Cache) -> CompressedModel:
    """The model that a recipe makes from these windows."""
    prepared = prepare(dense, recipe, QUIET, cut=lambda calibration, tokenizer: windows)
    return compress(dense, recipe, Workspace(cache, QUIET), prepared)


def chosen(dense: LoadedModel, selection: Any, recipe: Recipe = RECIPE, cache: Cache | None = None) -> Any:
    progress = Progress(quiet=True)
    preparation = prepare(dense, recipe, progress, reads_windows=True)
    check_candidates(dense, recipe, selection, preparation, progress)
    return select(dense, recipe, selection, preparation, Workspace(cache or Cache(None), progress))


def divergence(dense: LoadedModel, module: Any, ids: Tensor) -> float:
    """KL from the dense model, from all logits at once."""
    with torch.no_grad():
        p, q = (model(ids).logits[:, :-1].double().softmax(-1) for model in (dense.module, module))
    return float((p * (p / q).log()).sum(-1).mean())


@pytest.mark.parametrize("candidates", [GROUPINGS, METRICS], ids=["groupings", "metrics"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_candidate_that_stays_closest_wins(family: str, candidates: Mapping[str, Mapping[str, Any]]) -> None:
    """Oracle: every candidate compressed on the training windows, compared on the held-out ones, by brute force."""
    dense, selection = tiny_random(family), measured(candidates)
    contest = selection.contest(WINDOWS)
    oracle = {}
    for name, parts in candidates.items():
        recipe = replace(RECIPE, **parts)
        made = on_windows(dense, recipe, contest.training, Cache(None))
        oracle[name] = divergence(dense, made.module, contest.held_out.ids)
    found = chosen(dense, selection)
    assert {name: c["value"] for name, c in found.report["candidates"].items()} == pytest.approx(oracle, rel=1e-4)
    assert found.report["chosen"] == min(oracle, key=oracle.__getitem__)
    for part, strategy in candidates[found.report["chosen"]].items():
        assert getattr(found.recipe, part) == strategy
    assert found.report["seconds"] >= sum(c["seconds"] for c in found.report["candidates"].values()) - 0.01


def test_held_out_windows_enter_no_statistics() -> None:
    contest = measured().contest(WINDOWS)
    assert (len(contest.training.ids), len(contest.held_out.ids)) == (18, 6)
    other = measured(seed=1).contest(WINDOWS)
    assert other.held_out.provenance["sha256"] != contest.held_out.provenance["sha256"]
    # Other held-out windows, same training windows: same plans and factors.
    dense, cache = tiny_random(), Cache(None)
    chosen(dense, measured(recalibrate=False), cache=cache)
    grams = cache.misses["gram"]
    on_windows(dense, RECIPE, contest.training, cache)
    assert cache.misses["gram"] == grams


@pytest.mark.parametrize("recalibrate", [True, False])
def test_the_winner_sees_all_windows_or_those_that_it_was_chosen_on(recalibrate: bool) -> None:
    dense, cache = tiny_random(), Cache(None)
    found = chosen(dense, measured(recalibrate=recalibrate), cache=cache)
    misses = cache.misses["decomposition"]
    made = compress(dense, found.recipe, Workspace(cache, Progress(quiet=True)), found.preparation)
    contest = measured().contest(WINDOWS)
    expected = WINDOWS if recalibrate else contest.training
    assert made.calibration["sha256"] == expected.provenance["sha256"]
    assert (cache.misses["decomposition"] > misses) == recalibrate
    direct = replace(found.recipe, calibration=RECIPE.calibration)
    if recalibrate:
        assert made.plan == compress(dense, direct, Workspace(Cache(None), Progress(quiet=True))).plan


def test_candidates_share_statistics_and_decompositions() -> None:
    dense, cache = tiny_random(), Cache(None)
    alone = Cache(None)
    chosen(dense, measured({"pairs": {}}), cache=alone)
    chosen(dense, measured({"pairs": {}, "again": {}, "pivoted": {"layout": PivotedLayout()}}), cache=cache)
    assert cache.misses == alone.misses


@pytest.mark.parametrize(("rounds", "count"), [("single", 1), ("all", 2)])
def test_candidates_are_judged_after_one_round_or_all(rounds: str, count: int) -> None:
    dense, cache = tiny_random(), Cache(None)
    recipe = replace(RECIPE, schedule=EqualSteps(size=0.2))
    found = chosen(dense, measured({"one": {}}, rounds=rounds), recipe, cache)
    groups = len(prepare(dense, recipe, Progress(quiet=True)).groups or ())
    assert cache.misses["decomposition"] == count * groups
    assert found.recipe.schedule == recipe.schedule


def test_no_candidate_with_finite_outputs_is_an_error() -> None:
    dense = tiny_random()
    contest = measured().contest(WINDOWS)
    with torch.no_grad():  # a token that only the held-out windows hold
        training = set(contest.training.ids.flatten().tolist())
        rare = next(t for t in contest.held_out.ids.flatten().tolist() if t not in training)
        dense.module.get_input_embeddings().weight[rare] = float("nan")
    with pytest.raises(CalibrationError, match=r"None of the 2 candidates gives finite outputs.*Raise retain_ratio"):
        chosen(dense, measured())


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ({"few": {"sharing": AdjacentSharing(matrices=("q",), group_size=9)}}, "group_size must be between 1 and 3"),
        ({"one": {}, "few": {"sharing": AdjacentSharing(matrices=("zz",), group_size=2)}}, "zz is no matrix type"),
    ],
)
def test_a_candidate_that_does_not_fit_is_named_before_any_work(
    candidates: Mapping[str, Mapping[str, Any]], message: str
) -> None:
    dense, progress = tiny_random(), Progress(quiet=True)
    with pytest.raises(ConfigError, match=message) as caught:
        check_candidates(dense, RECIPE, measured(candidates), prepare(dense, RECIPE, progress), progress)
    assert caught.value.__notes__ == ["This is about the candidate selection.candidates.few."]


@pytest.mark.parametrize(
    ("candidates", "dials", "message"),
    [
        ({}, {}, "candidates is empty.*selection=none"),
        ({"one": {"update": NoUpdate()}}, {}, r"candidates\.one replaces update, .* Parts: sharing, whitening"),
        (GROUPINGS, {"objective": "bleu"}, "objective must be one of cosine, perplexity, kl"),
        (GROUPINGS, {"holdout": 0.0}, "holdout must be above 0"),
        (GROUPINGS, {"holdout": 1.0}, "holdout must be at least 0 and below 1"),
        (GROUPINGS, {"rounds": "two"}, "rounds must be one of single, all"),
        (GROUPINGS, {"seed": -1}, "seed must be a whole number of at least 0"),
    ],
)
def test_settings_out_of_range(
    candidates: Mapping[str, Mapping[str, Any]], dials: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        measured(candidates, **dials)


def test_one_window_cannot_be_split() -> None:
    with pytest.raises(DataError, match=r"at least 2 calibration windows, one of them held out, got 1.*selection=none"):
        measured().contest(RandomTokens(count=1).windows(None))
    both = measured(holdout=0.01).contest(RandomTokens(count=2).windows(None))
    assert (len(both.training.ids), len(both.held_out.ids)) == (1, 1)


def test_a_candidates_own_search_is_checked_on_what_it_will_see() -> None:
    """18 of the 24 windows are left to train on."""
    dense, progress = tiny_random(), Progress(quiet=True)
    searching = SensitivitySearch(ratios=(0.5,), unit="block", objective="kl", num_windows=20)
    with pytest.raises(ConfigError, match=r"num_windows must be at most .* 18, got 20"):
        check_candidates(
            dense, RECIPE, measured({"one": {"allocation": searching}}), prepare(dense, RECIPE, progress), progress
        )


def test_a_run_chooses_and_its_record_says_how(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    done = cli(
        *(*tiny, "experiment=best", "schedule=single", "selection=measured", "retain_ratio=0.6", "hydra.run.dir=out")
    )
    assert done.status == 0, done.err
    record = read_record(tmp_path / "out")
    found = record.selection
    assert set(found["candidates"]) == {"private", "pairs", "optimal", "private_tempered", "pairs_tempered"}
    values = {name: c["value"] for name, c in found["candidates"].items()}
    assert found["chosen"] == min(values, key=values.__getitem__)
    assert found["seconds"] > 0 and found["held_out_windows"] + found["training_windows"] > 2
    assert any(note.startswith(f"selection: {found['chosen']} stays closest") for note in record.notes)
    assert record.timings["select"] > 0
    shared = [group for group in record.plan["groups"] if len(group["layers"]) > 1]  # type: ignore[index]
    assert bool(shared) == found["chosen"].startswith("pairs") or found["chosen"] == "optimal"


@pytest.mark.slow
def test_candidates_are_composed_on_the_command_line(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    done = cli(
        *(*tiny, "experiment=basis_sharing", "selection=measured", "hydra.run.dir=out"),
        *(f"~selection.candidates.{name}" for name in ("pairs", "optimal", "private_tempered", "pairs_tempered")),
        *("+sharing@selection.candidates.threes.sharing=all", "selection.candidates.threes.sharing.group_size=3"),
        "selection.candidates.private.whitening.damping=1e-2",
    )
    assert done.status == 0, done.err
    assert set(read_record(tmp_path / "out").selection["candidates"]) == {"private", "threes"}
