"""Compression, stage by stage: group, calibrate, decompose, allocate, truncate, replace, update."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bs_exp.allocation.budget import check_retain_ratio
from bs_exp.cache import Cache
from bs_exp.calibration.statistics import calibrate, statistics_key
from bs_exp.corpora.windows import check_fits
from bs_exp.decompositions import KIND, Decompositions, decompose_missing, decomposition_keys
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

    @property
    def needs(self) -> frozenset[Statistic]:
        """The statistics that the strategies ask for."""
        return self.whitening.needs | self.importance.needs


def compress(dense: LoadedModel, recipe: Recipe, cache: Cache, journal: Journal) -> CompressedModel:
    """A compressed twin of `dense`, within the recipe's retain ratio; untouched parameters are shared with it.

    Every round of the schedule takes its statistics on the model compressed so far, and factorises the original
    weights.
    """
    with journal.stage("group"):
        groups = recipe.sharing.groups(dense.architecture)
    windows = None
    if recipe.needs:
        with journal.stage("tokenise"):
            windows = recipe.calibration.windows(dense.tokenizer)
            check_fits(windows, dense)
    current, rounds = dense, [1.0]
    while True:
        decompositions = decompose_groups(dense, current, groups, windows, recipe, cache, journal)
        with journal.stage("allocate"):
            plan = next_plan(decompositions.spectra, rounds[-1], recipe)
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
        recipe.update.apply(module, dense, recipe.calibration)
    provenance = windows.provenance if windows else {}
    return CompressedModel(module=module, plan=plan, calibration=provenance, rounds=tuple(rounds[1:]))


def next_plan(spectra: tuple[Spectrum, ...], current: float, recipe: Recipe) -> RankPlan:
    """The plan of the next round, from the share kept so far."""

    def plan_at(ratio: float) -> RankPlan:
        return recipe.allocation.allocate(AllocationProblem(spectra, ratio, recipe.layout))

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
            stats = calibrate(current, windows, recipe.calibration, needs=recipe.needs, cache=cache, journal=journal)
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
