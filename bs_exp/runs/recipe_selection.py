"""Choice of a recipe by measurement: every candidate is compressed and compared with the dense model."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bs_exp import processes
from bs_exp.errors import BsExpError, CalibrationError
from bs_exp.pipeline import Preparation, Recipe, compress, prepare
from bs_exp.plan_score import Comparison, check_measurable
from bs_exp.precision.none import ModelPrecision
from bs_exp.progress import Progress
from bs_exp.protocols import Contest, Selection
from bs_exp.records.stages import Stage, candidate_stage
from bs_exp.schedule.single import SingleRound
from bs_exp.types import LoadedModel, TokenWindows
from bs_exp.update.none import NoUpdate
from bs_exp.workspace import Workspace


@dataclass(frozen=True, eq=False)
class Selected:
    """The recipe that is used, and plain data on how it was chosen, empty if nothing was."""

    recipe: Recipe
    preparation: Preparation
    report: Mapping[str, Any] = field(default_factory=dict)


def check_candidates(
    dense: LoadedModel, recipe: Recipe, selection: Selection, prepared: Preparation, progress: Progress
) -> None:
    """An error for a candidate that does not fit model or text, before the long work."""
    if not selection.candidates:
        return
    with progress.stage(Stage.CHECK_CANDIDATES):
        contest = selection.contest(prepared.data.windows)
        check_measurable(dense, contest.objective, contest.held_out)
        for name in selection.candidates:
            try:
                _prepared(dense, _candidate(recipe, selection, name, contest), contest.training)
            except BsExpError as error:
                error.add_note(f"This is about the candidate selection.candidates.{name}.")
                raise


def select(
    dense: LoadedModel, recipe: Recipe, selection: Selection, prepared: Preparation, workspace: Workspace
) -> Selected:
    """The recipe of the candidate that does best on the held-out windows.

    Statistics and decompositions that candidates have in common are made once. Raises CalibrationError if no candidate
    has finite outputs.
    """
    if not selection.candidates:
        return Selected(recipe, prepared)
    begun, progress = time.perf_counter(), workspace.progress
    with progress.stage(Stage.SELECT):
        contest = selection.contest(prepared.data.windows)
        held_out = replace(prepared.data, windows=contest.held_out)
        comparison = Comparison(dense=dense, data=held_out, objective=contest.objective)
        judged: dict[str, dict[str, Any]] = {}
        for name in selection.candidates:
            start = time.perf_counter()
            with progress.stage(candidate_stage(name)):
                candidate = _candidate(recipe, selection, name, contest)
                made = compress(dense, candidate, workspace, _prepared(dense, candidate, contest.training))
                value = comparison.measure(made.module)
            judged[name] = {
                "value": value,
                "retain_ratio": made.plan.retain_ratio,
                "predicted_loss": made.plan.predicted_loss,
                "seconds": round(time.perf_counter() - start, 3),
            }
    judged = processes.from_first(lambda: judged)
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
    winner = replace(recipe, **selection.candidates[chosen])
    # Read and checked before: the windows are not cut again.
    windows = prepared.data.windows if contest.recalibrate else contest.training
    return Selected(winner, _prepared(dense, winner, windows), report)


def _candidate(recipe: Recipe, selection: Selection, name: str, contest: Contest) -> Recipe:
    """The recipe of a candidate in the comparison: without an update, in the model's dtype, and in one round where the
    contest says so."""
    candidate = replace(recipe, **selection.candidates[name], update=NoUpdate(), precision=ModelPrecision())
    return replace(candidate, schedule=SingleRound()) if contest.single_round else candidate


def _prepared(dense: LoadedModel, recipe: Recipe, windows: TokenWindows) -> Preparation:
    """The preparation of a recipe on windows that are there already."""
    return prepare(dense, recipe, Progress(quiet=True), cut=lambda calibration, tokenizer: windows)
