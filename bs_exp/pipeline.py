"""Compression, stage by stage: group, calibrate, decompose, allocate, truncate, replace, update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from bs_exp.allocation.budget import check_retain_ratio
from bs_exp.cache import Cache
from bs_exp.calibration.profile import profile_blocks
from bs_exp.corpora.windows import check_fits
from bs_exp.decompositions import decompose_groups
from bs_exp.errors import BsExpError, ConfigError
from bs_exp.journal import Journal
from bs_exp.measures import GroupMeasures
from bs_exp.models.fingerprint import fingerprint
from bs_exp.protocols import (
    Allocation,
    AllocationProblem,
    Calibration,
    Importance,
    Layout,
    Schedule,
    Sharing,
    SharingProblem,
    Update,
    Whitening,
)
from bs_exp.replacement import replace_matrices, twin
from bs_exp.sharing.none import singles
from bs_exp.types import (
    CompressedModel,
    LayerProfile,
    LoadedModel,
    RankPlan,
    Spectrum,
    Statistic,
    TokenWindows,
    WeightGroup,
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The strategies of one compression and the share of the targeted parameters to keep."""

    calibration: Calibration
    sharing: Sharing
    whitening: Whitening
    importance: Importance
    allocation: Allocation
    layout: Layout
    schedule: Schedule
    update: Update
    retain_ratio: float

    def __post_init__(self) -> None:
        check_retain_ratio(self.retain_ratio)
        if self.importance.needs and Statistic.GRAM not in self.whitening.needs:
            raise ConfigError(
                f"importance {type(self.importance).__name__} re-weights the Gram of the inputs, which whitening "
                f"{type(self.whitening).__name__} does not read. Use importance=none, or a whitening made from the "
                "Gram, such as whitening=gram, block_diagonal or two_sided."
            )

    @property
    def needs(self) -> frozenset[Statistic]:
        """The statistics that the strategies ask for."""
        return self.metric_needs | self.sharing.needs | self.allocation.needs

    @property
    def metric_needs(self) -> frozenset[Statistic]:
        """Those that the metric, and so every decomposition, depends on."""
        return self.whitening.needs | self.importance.needs


@dataclass(eq=False)
class ReadOnce:
    """A calibration whose windows are cut and checked when they are first asked for, and not again."""

    calibration: Calibration
    model: LoadedModel
    journal: Journal
    _windows: TokenWindows | None = None

    @property
    def batch_size(self) -> int:
        return self.calibration.batch_size

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Of the windows; empty if nobody asked for them."""
        return self._windows.provenance if self._windows else {}

    def windows(self, tokenizer: PreTrainedTokenizerBase) -> TokenWindows:
        if self._windows is None:
            with self.journal.stage("tokenise"):
                windows = self.calibration.windows(tokenizer)
                check_fits(windows, self.model)
            self._windows = windows
        return self._windows


@dataclass(frozen=True, eq=False)
class Preparation:
    """What a recipe makes of a model before any work: who shares with whom, and the calibration windows.

    Groups that depend on weights and statistics are not known yet.
    """

    groups: tuple[WeightGroup, ...] | None
    calibration: ReadOnce


def prepare(dense: LoadedModel, recipe: Recipe, journal: Journal) -> Preparation:
    """Groups and windows, in seconds: settings that do not fit model or text fail here, before the long work."""
    with journal.stage("group"):
        recipe.sharing.check(dense.architecture)
        groups = None if recipe.sharing.measured else recipe.sharing.groups(_sharing_problem(dense, recipe))
        recipe.allocation.check(groups or singles(dense.architecture), recipe.retain_ratio, recipe.layout)
    calibration = ReadOnce(recipe.calibration, dense, journal)
    if recipe.needs:
        try:
            calibration.windows(dense.tokenizer)
        except BsExpError as error:
            error.add_note("This is about the calibration text and its windows (calibration=...).")
            raise
    return Preparation(groups, calibration)


def compress(
    dense: LoadedModel, recipe: Recipe, cache: Cache, journal: Journal, preparation: Preparation | None = None
) -> CompressedModel:
    """A compressed twin of `dense`, within the recipe's retain ratio; untouched parameters are shared with it.

    Every round of the schedule takes its statistics on the model compressed so far, and factorises the original
    weights.
    """
    prepared = preparation or prepare(dense, recipe, journal)
    calibration = prepared.calibration
    windows = calibration.windows(dense.tokenizer) if recipe.needs else None
    profile = None
    if windows and recipe.allocation.needs:
        with journal.stage("profile"):
            needs = recipe.allocation.needs
            profile = profile_blocks(dense, windows, calibration, needs=needs, cache=cache, journal=journal)
    measures = _measures(dense, dense, windows, recipe, recipe.metric_needs | recipe.sharing.needs, cache, journal)
    groups = prepared.groups
    if groups is None:
        measures.gather()
        with journal.stage("group"):
            groups = recipe.sharing.groups(_sharing_problem(dense, recipe, measures))
            recipe.allocation.check(groups, recipe.retain_ratio, recipe.layout)
    rounds = [1.0]
    while True:
        decompositions = decompose_groups(groups, measures, cache, journal)
        with journal.stage("allocate"):
            plan = next_plan(decompositions.spectra, profile, rounds[-1], recipe)
        with journal.stage("replace"):
            module = twin(dense.module)
            factors = (recipe.layout.arrange(shared) for shared in decompositions.truncated(plan))
            replace_matrices(module, dense.architecture, factors, layout=recipe.layout.name)
        rounds.append(plan.requested_ratio)
        if plan.requested_ratio <= recipe.retain_ratio:
            break
        journal.note(f"round {len(rounds) - 1}: {plan.retain_ratio:.3f} kept, predicted loss {plan.predicted_loss:.4g}")
        current = replace(dense, module=module, provenance={**dense.provenance, "fingerprint": fingerprint(module)})
        measures = _measures(dense, current, windows, recipe, recipe.metric_needs, cache, journal)
    with journal.stage("update"):
        report = recipe.update.apply(module, dense, calibration, cache, journal)
    return CompressedModel(
        module=module, plan=plan, calibration=calibration.provenance, rounds=tuple(rounds[1:]), update=report
    )


def _sharing_problem(dense: LoadedModel, recipe: Recipe, measures: GroupMeasures | None = None) -> SharingProblem:
    return SharingProblem(dense.architecture, recipe.retain_ratio, recipe.layout, measures)


def _measures(
    dense: LoadedModel,
    current: LoadedModel,
    windows: TokenWindows | None,
    recipe: Recipe,
    needs: frozenset[Statistic],
    cache: Cache,
    journal: Journal,
) -> GroupMeasures:
    return GroupMeasures(
        dense=dense,
        current=current,
        windows=windows if needs else None,
        calibration=recipe.calibration,
        needs=needs,
        whitening=recipe.whitening,
        importance=recipe.importance,
        cache=cache,
        journal=journal,
    )


def next_plan(spectra: tuple[Spectrum, ...], profile: LayerProfile | None, current: float, recipe: Recipe) -> RankPlan:
    """The plan of the next round, from the share kept so far."""

    def plan_at(ratio: float) -> RankPlan:
        return recipe.allocation.allocate(AllocationProblem(spectra, ratio, recipe.layout, profile))

    ratio = recipe.schedule.next_ratio(current, recipe.retain_ratio, lambda kept: plan_at(kept).predicted_loss)
    return plan_at(ratio)
