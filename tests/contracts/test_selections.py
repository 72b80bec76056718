"""What every selection keeps: candidates that are recipes, a fair contest on windows unseen, and plain data on it."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

import pytest
import torch

from bs_exp.cache import Cache
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress, prepare
from bs_exp.progress import Progress
from bs_exp.protocols import Selection
from bs_exp.runs.recipe_selection import Selected, check_candidates, select
from bs_exp.types import Feeding
from bs_exp.workspace import Workspace
from tests.support.options import option_of, options, strategy
from tests.support.recipes import RECIPE

WINDOWS = dataclasses.replace(RECIPE.calibration.windows(None), feeding=Feeding(mask_share=0.3))
ROWS = [
    "selection=none",
    "selection=measured ~selection.candidates.optimal ~selection.candidates.pairs_tempered",
    "selection=measured selection.holdout=0.9 selection.recalibrate=false selection.seed=3"
    " ~selection.candidates.optimal ~selection.candidates.pairs_tempered ~selection.candidates.private_tempered",
]
EVERY = pytest.mark.parametrize("row", ROWS, ids=[row[:40] for row in ROWS])


@cache
def chosen(row: str) -> tuple[Selected, Cache]:
    """What the strategy makes of the recipe of the tests, and what was computed for it."""
    dense, selection, cache, progress = tiny_random(), strategy(row), Cache(None), Progress(quiet=True)
    preparation = prepare(dense, RECIPE, progress, reads_windows=True)
    check_candidates(dense, RECIPE, selection, preparation, progress)
    return select(dense, RECIPE, selection, preparation, Workspace(cache, progress)), cache


def test_every_option_has_a_row() -> None:
    assert {option_of(row) for row in ROWS} == options("selection")


@EVERY
def test_candidates_are_recipes(row: str) -> None:
    selection: Selection = strategy(row)
    for parts in selection.candidates.values():
        dataclasses.replace(RECIPE, **parts)


@EVERY
def test_a_contest_is_on_windows_that_no_candidate_has_seen(row: str) -> None:
    selection: Selection = strategy(row)
    if not selection.candidates:
        with pytest.raises(ValueError, match="no candidates"):
            selection.contest(WINDOWS)
        return
    before = WINDOWS.ids.clone()
    contest, again = selection.contest(WINDOWS), selection.contest(WINDOWS)
    training, held_out = ({tuple(w) for w in part.ids.tolist()} for part in (contest.training, contest.held_out))
    assert training and held_out and not training & held_out
    assert training | held_out == {tuple(w) for w in WINDOWS.ids.tolist()}
    assert len({part.provenance["sha256"] for part in (WINDOWS, contest.training, contest.held_out)}) == 3
    assert torch.equal(contest.held_out.ids, again.held_out.ids) and torch.equal(WINDOWS.ids, before)
    assert contest.training.feeding == contest.held_out.feeding == WINDOWS.feeding


@EVERY
def test_the_recipe_that_is_used_is_a_candidates(row: str) -> None:
    selection, (found, cache) = strategy(row), chosen(row)
    if not selection.candidates:
        assert found.recipe is RECIPE and found.report == {} and cache.misses == {}
        return
    parts: dict[str, Any] = dict(selection.candidates[found.report["chosen"]])
    assert all(getattr(found.recipe, part) == value for part, value in parts.items())
    untouched = {field.name for field in dataclasses.fields(RECIPE)} - parts.keys() - {"calibration"}
    assert all(getattr(found.recipe, part) == getattr(RECIPE, part) for part in untouched)
    made = compress(tiny_random(), found.recipe, Workspace(cache, Progress(quiet=True)), found.preparation)
    assert made.plan.requested_ratio == RECIPE.retain_ratio


@EVERY
def test_the_report_is_plain_data(row: str) -> None:
    report = chosen(row)[0].report
    assert json.loads(json.dumps(report, allow_nan=False)) == report
