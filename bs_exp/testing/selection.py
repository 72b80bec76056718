"""What every selection keeps: candidates that are recipes, a fair contest on windows unseen, and plain data on it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bs_exp.cache import Cache
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress, prepare
from bs_exp.progress import Progress
from bs_exp.protocols import Selection
from bs_exp.runs.recipe_selection import Selected, check_candidates, select
from bs_exp.testing.models import Tokens, recipe
from bs_exp.types import Feeding
from bs_exp.update.none import NoUpdate
from bs_exp.workspace import Workspace

RECIPE = dataclasses.replace(recipe(NoUpdate()), calibration=Tokens(count=24), retain_ratio=0.6)
WINDOWS = dataclasses.replace(Tokens(count=24).windows(None), feeding=Feeding(mask_share=0.3))


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a strategy makes of `RECIPE`, and what was computed for it."""

    selected: Selected
    cache: Cache


class SelectionContract:
    """Subclass it as `TestMine`, with a fixture `selection` that returns the strategy."""

    @pytest.fixture(scope="class")
    @classmethod
    def selection(cls) -> Selection:
        """The strategy."""
        raise NotImplementedError("override the fixture `selection`: it returns the strategy.")

    @pytest.fixture(scope="class")
    @classmethod
    def chosen(cls, selection: Selection) -> Chosen:
        """What it chooses."""
        dense, cache, progress = tiny_random(), Cache(None), Progress(quiet=True)
        preparation = prepare(dense, RECIPE, progress, reads_windows=True)
        check_candidates(dense, RECIPE, selection, preparation, progress)
        return Chosen(select(dense, RECIPE, selection, preparation, Workspace(cache, progress)), cache)

    def test_candidates_are_recipes(self, selection: Selection) -> None:
        for parts in selection.candidates.values():
            changes: dict[str, Any] = dict(parts)
            dataclasses.replace(RECIPE, **changes)

    def test_a_contest_is_on_windows_that_no_candidate_has_seen(self, selection: Selection) -> None:
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

    def test_the_recipe_that_is_used_is_a_candidates(self, selection: Selection, chosen: Chosen) -> None:
        found, cache = chosen.selected, chosen.cache
        if not selection.candidates:
            assert found.recipe is RECIPE and found.report == {} and cache.misses == {}
            return
        parts: dict[str, Any] = dict(selection.candidates[found.report["chosen"]])
        assert all(getattr(found.recipe, part) == value for part, value in parts.items())
        untouched = {field.name for field in dataclasses.fields(RECIPE)} - parts.keys() - {"calibration"}
        assert all(getattr(found.recipe, part) == getattr(RECIPE, part) for part in untouched)
        made = compress(tiny_random(), found.recipe, Workspace(cache, Progress(quiet=True)), found.preparation)
        assert made.plan.requested_ratio == RECIPE.retain_ratio

    def test_the_report_is_plain_data(self, chosen: Chosen) -> None:
        report = chosen.selected.report
        assert json.loads(json.dumps(report, allow_nan=False)) == report
