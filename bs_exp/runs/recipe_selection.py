"""Choice of a recipe by measurement: every candidate is compressed and compared with the dense model."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from bs_exp.cache import Cache
from bs_exp.errors import BsExpError, CalibrationError
from bs_exp.pipeline import Preparation, Recipe, compress, prepare
from bs_exp.plan_score import Comparison, check_measurable
from bs_exp.progress import Progress
from bs_exp.protocols import Contest, Selection
from bs_exp.schedule.single import SingleRound
from bs_exp.types import LoadedModel, TokenWindows
from bs_exp.update.none import NoUpdate


@dataclass(frozen=True, eq=False, kw_only=True)
class GivenWindows:
    """A calibration on windows that are there already."""

    given: TokenWindows
    batch_size: int

    def windows(self, tokenizer: PreTrainedTokenizerBase) -> TokenWindows:
        return self.given


@dataclass(frozen=True, eq=False)
class Selected:
    """The recipe that is used, and plain data on how it was chosen, empty if nothing was."""

    recipe: Recipe
    preparation: Preparation
    report: Mapping[str, Any] = field(default_factory=dict)


def check_candidates(
    dense: LoadedModel, recipe: Recipe, selection: Selection, preparation: Preparation, progress: Progress
) -> None:
    """An error for a candidate that does not fit model or text, before the long work."""
    if not selection.candidates:
        return
    with progress.stage("check candidates"):
        contest = _contest(dense, selection, preparation)
        check_measurable(dense, contest.objective, contest.held_out)
        for name in selection.candidates:
            try:
                prepare(dense, _judged(recipe, selection, name, contest), Progress(quiet=True))
            except BsExpError as error:
                error.add_note(f"This is about the candidate selection.candidates.{name}.")
                raise


def select(
    dense: LoadedModel,
    recipe: Recipe,
    selection: Selection,
    preparation: Preparation,
    cache: Cache,
    progress: Progress,
) -> Selected:
    """The recipe of the candidate that does best on the held-out windows.

    Statistics and decompositions that candidates have in common are made once. Raises CalibrationError if no candidate
    has finite outputs.
    """
    if not selection.candidates:
        return Selected(recipe, preparation)
    begun = time.perf_counter()
    with progress.stage("select"):
        contest = _contest(dense, selection, preparation)
        comparison = Comparison(
            dense=dense,
            windows=contest.held_out,
            objective=contest.objective,
            batch_size=recipe.calibration.batch_size,
        )
        judged: dict[str, dict[str, Any]] = {}
        for name in selection.candidates:
            start = time.perf_counter()
            with progress.stage(f"candidate {name}"):
                made = compress(dense, _judged(recipe, selection, name, contest), cache, progress)
                value = comparison.measure(made.module)
            judged[name] = {
                "value": value,
                "retain_ratio": made.plan.retain_ratio,
                "predicted_loss": made.plan.predicted_loss,
                "seconds": round(time.perf_counter() - start, 3),
            }
    values = {name: float(found["value"]) for name, found in judged.items()}
    chosen = min(values, key=values.__getitem__)  # of equals the first
    if not math.isfinite(values[chosen]):
        raise CalibrationError(
            f"None of the {len(values)} candidates gives finite outputs on the held-out windows. Raise retain_ratio, "
            "or load the model in another dtype (model.dtype=float32)."
        )
    report = {
        "chosen": chosen,
        "objective": contest.objective.objective,
        "candidates": judged,
        "training_windows": len(contest.training.ids),
        "held_out_windows": len(contest.held_out.ids),
        "held_out_sha256": contest.held_out.provenance["sha256"],
        "single_round": contest.single_round,
        "recalibrated": contest.recalibrate,
        "seconds": round(time.perf_counter() - begun, 3),
    }
    shown = ", ".join(f"{name} {value:.4g}" for name, value in sorted(values.items(), key=lambda item: item[1]))
    progress.note(
        f"selection: {chosen} stays closest to the dense model ({contest.objective.objective} on "
        f"{len(contest.held_out.ids)} held-out windows: {shown})"
    )
    # Read and checked before: the windows are not cut again.
    calibration = preparation.calibration if contest.recalibrate else _given(contest, preparation)
    winner = replace(recipe, **selection.candidates[chosen], calibration=calibration)
    return Selected(winner, prepare(dense, winner, Progress(quiet=True)), report)


def _contest(dense: LoadedModel, selection: Selection, preparation: Preparation) -> Contest:
    return selection.contest(preparation.calibration.windows(dense.tokenizer))


def _judged(recipe: Recipe, selection: Selection, name: str, contest: Contest) -> Recipe:
    """A candidate as it is judged."""
    calibration = GivenWindows(given=contest.training, batch_size=recipe.calibration.batch_size)
    candidate = replace(recipe, **selection.candidates[name], calibration=calibration, update=NoUpdate())
    return replace(candidate, schedule=SingleRound()) if contest.single_round else candidate


def _given(contest: Contest, preparation: Preparation) -> GivenWindows:
    return GivenWindows(given=contest.training, batch_size=preparation.calibration.batch_size)
