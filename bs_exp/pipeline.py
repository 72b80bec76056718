"""Compression, stage by stage: group, calibrate, decompose, allocate, truncate, replace, update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from bs_exp.allocation.budget import check_retain_ratio
from bs_exp.cache import Cache
from bs_exp.calibration.profile import profile_blocks
from bs_exp.calibration.statistics import calibrate, statistics_key
from bs_exp.corpora.windows import check_fits
from bs_exp.decompositions import KIND, Decompositions, decompose_missing, decomposition_keys
from bs_exp.errors import BsExpError, ConfigError
from bs_exp.journal import Journal
from bs_exp.models.fingerprint import fingerprint
from bs_exp.protocols import (
    Allocation,
    AllocationProblem,
    Calibration,
    Importance,
    Layout,
    Schedule,
    Sharing,
    Update,
    Whitening,
)
from bs_exp.replacement import replace_matrices, twin
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
        return self.metric_needs | self.allocation.needs

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
    """What a recipe makes of a model before any work: who shares with whom, and the calibration windows."""

    groups: tuple[WeightGroup, ...]
    calibration: ReadOnce


def prepare(dense: LoadedModel, recipe: Recipe, journal: Journal) -> Preparation:
    """Groups and windows, in seconds: settings that do not fit model or text fail here, before the long work."""
    with journal.stage("group"):
        groups = recipe.sharing.groups(dense.architecture)
        recipe.allocation.check(groups, recipe.retain_ratio, recipe.layout)
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
    groups, calibration = prepared.groups, prepared.calibration
    windows = calibration.windows(dense.tokenizer) if recipe.needs else None
    profile = None
    if windows and recipe.allocation.needs:
        with journal.stage("profile"):
            needs = recipe.allocation.needs
            profile = profile_blocks(dense, windows, calibration, needs=needs, cache=cache, journal=journal)
    metric_windows = windows if recipe.metric_needs else None
    current, rounds = dense, [1.0]
    while True:
        decompositions = decompose_groups(dense, current, groups, metric_windows, recipe, cache, journal)
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
    with journal.stage("update"):
        report = recipe.update.apply(module, dense, calibration, cache, journal)
    return CompressedModel(
        module=module, plan=plan, calibration=calibration.provenance, rounds=tuple(rounds[1:]), update=report
    )


def next_plan(spectra: tuple[Spectrum, ...], profile: LayerProfile | None, current: float, recipe: Recipe) -> RankPlan:
    """The plan of the next round, from the share kept so far."""

    def plan_at(ratio: float) -> RankPlan:
        return recipe.allocation.allocate(AllocationProblem(spectra, ratio, recipe.layout, profile))

    ratio = recipe.schedule.next_ratio(current, recipe.retain_ratio, lambda kept: plan_at(kept).predicted_loss)
    return plan_at(ratio)


def decompose_groups(
    dense: LoadedModel,
    current: LoadedModel,
    groups: tuple[WeightGroup, ...],
    windows: TokenWindows | None,
    recipe: Recipe,
    cache: Cache,
    journal: Journal,
) -> Decompositions:
    """Decompositions of the dense weights in the metric of the current model: from the cache where it has them.

    Statistics are gathered only if some decomposition is missing.
    """
    statistics = statistics_key(current, windows, recipe.calibration.batch_size) if windows else None
    keys = decomposition_keys(
        dense, groups, whitening=recipe.whitening, importance=recipe.importance, statistics=statistics
    )
    found = {group: entry for group, key in keys.items() if (entry := cache.find(KIND, key)) is not None}
    missing = {group: key for group, key in keys.items() if group not in found}
    stats = None
    if missing and windows:
        with journal.stage("calibrate"):
            needs = recipe.metric_needs
            stats = calibrate(current, windows, recipe.calibration, needs=needs, cache=cache, journal=journal)
    with journal.stage("decompose"):
        made = decompose_missing(
            dense,
            missing,
            whitening=recipe.whitening,
            importance=recipe.importance,
            statistics=stats,
            cache=cache,
            journal=journal,
        )
    if found:
        journal.note(f"{len(found)} of {len(keys)} decompositions came from the cache")
    return Decompositions({group: found.get(group) or made[group] for group in keys})
