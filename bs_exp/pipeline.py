"""Compression, stage by stage: group, calibrate, decompose, allocate, truncate, replace, update."""

from __future__ import annotations

from dataclasses import dataclass

from bs_exp.allocation.budget import check_retain_ratio
from bs_exp.cache import Cache
from bs_exp.calibration.statistics import calibrate, statistics_key
from bs_exp.decompositions import KIND, Decompositions, decompose_missing, decomposition_keys
from bs_exp.journal import Journal
from bs_exp.protocols import Allocation, AllocationProblem, Calibration, Importance, Layout, Sharing, Update, Whitening
from bs_exp.replacement import replace_matrices, twin
from bs_exp.types import CompressedModel, LoadedModel, Statistic, TokenWindows, WeightGroup


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The strategies of one compression and the share of the targeted parameters to keep."""

    calibration: Calibration
    sharing: Sharing
    whitening: Whitening
    importance: Importance
    allocation: Allocation
    layout: Layout
    update: Update
    retain_ratio: float

    def __post_init__(self) -> None:
        check_retain_ratio(self.retain_ratio)

    @property
    def needs(self) -> frozenset[Statistic]:
        """The statistics that the strategies ask for."""
        return self.whitening.needs | self.importance.needs


def compress(dense: LoadedModel, recipe: Recipe, cache: Cache, journal: Journal) -> CompressedModel:
    """A compressed twin of `dense`, within the recipe's retain ratio; untouched parameters are shared with it."""
    groups = recipe.sharing.groups(dense.architecture)
    windows = None
    if recipe.needs:
        with journal.stage("tokenise"):
            windows = recipe.calibration.windows(dense.tokenizer)
    decompositions = decompose_groups(dense, groups, windows, recipe, cache, journal)
    with journal.stage("allocate"):
        plan = recipe.allocation.allocate(AllocationProblem(decompositions.spectra, recipe.retain_ratio, recipe.layout))
    with journal.stage("replace"):
        module = twin(dense.module)
        replace_matrices(module, dense.architecture, decompositions.truncated(plan))
    with journal.stage("update"):
        recipe.update.apply(module, dense, recipe.calibration)
    return CompressedModel(module=module, plan=plan, calibration=windows.provenance if windows else {})


def decompose_groups(
    dense: LoadedModel,
    groups: tuple[WeightGroup, ...],
    windows: TokenWindows | None,
    recipe: Recipe,
    cache: Cache,
    journal: Journal,
) -> Decompositions:
    """Every group's decomposition: from the cache where it has them, and calibrated only if it lacks some."""
    statistics = statistics_key(dense, windows, recipe.calibration.batch_size) if windows else None
    keys = decomposition_keys(
        dense, groups, whitening=recipe.whitening, importance=recipe.importance, statistics=statistics
    )
    found = {group: entry for group, key in keys.items() if (entry := cache.find(KIND, key)) is not None}
    missing = {group: key for group, key in keys.items() if group not in found}
    stats = None
    if missing and windows:
        with journal.stage("calibrate"):
            stats = calibrate(dense, windows, recipe.calibration, needs=recipe.needs, cache=cache, journal=journal)
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
