"""Compression, stage by stage: group, calibrate, decompose, allocate, truncate, replace, update, quantise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bs_exp import processes
from bs_exp.calibration.group_statistics import OF_MATRICES, check_gatherable
from bs_exp.calibration.profile import profile_blocks
from bs_exp.contracts import (
    check_groups,
    check_members,
    check_plan,
    check_ratio,
    check_windows,
    only_factors_change,
    only_groups_change,
)
from bs_exp.corpora.fitting import fitted, told
from bs_exp.corpora.windows import check_fits
from bs_exp.errors import BsExpError, ConfigError
from bs_exp.factorization.factors import decompose_groups
from bs_exp.factorization.spectra import GroupMeasures
from bs_exp.identity import identity
from bs_exp.models.experts import unfused
from bs_exp.models.fingerprint import as_loaded
from bs_exp.models.surgery import replace_matrices, twin
from bs_exp.plan_score import Comparison, PlanScore, check_measurable
from bs_exp.precision.none import ModelPrecision
from bs_exp.progress import Progress
from bs_exp.protocols import (
    AdaptsToModel,
    Allocation,
    AllocationProblem,
    Calibration,
    Importance,
    Layout,
    MeasuredAllocation,
    Precision,
    Schedule,
    Score,
    Sharing,
    SharingProblem,
    SplitsMatrices,
    Update,
    UpdatesRounds,
    Whitening,
)
from bs_exp.rank_budget import make_plan, share_out
from bs_exp.records.stages import Stage
from bs_exp.sharing.none import singles
from bs_exp.types import (
    Activations,
    CalibrationData,
    CompressedModel,
    LayerProfile,
    LoadedModel,
    Probes,
    RankPlan,
    Spectrum,
    Statistic,
    TokenWindows,
    WeightGroup,
)
from bs_exp.validation import check_retain_ratio
from bs_exp.workspace import Workspace

STRATEGIES = (
    "calibration",
    "sharing",
    "whitening",
    "importance",
    "allocation",
    "layout",
    "schedule",
    "update",
    "precision",
)

# A metric made of one of them adds up: it is in nats, or in cosines.
_OUTPUT_GRAMS = frozenset(
    {
        Statistic.OUTPUT_GRAM,
        Statistic.SAMPLED_OUTPUT_GRAM,
        Statistic.TOP_K_OUTPUT_GRAM,
        Statistic.PROBED_OUTPUT_GRAM,
    }
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
    precision: Precision = field(default_factory=ModelPrecision)

    def __post_init__(self) -> None:
        for family in STRATEGIES:
            check_members(family, getattr(self, family))
        check_retain_ratio(self.retain_ratio)
        if self.importance.needs and Statistic.GRAM not in self.whitening.needs:
            raise ConfigError(
                f"importance {type(self.importance).__name__} re-weights the Gram of the inputs, which whitening "
                f"{type(self.whitening).__name__} does not read. Use importance=none, or a whitening made from the "
                "Gram, such as whitening=gram, block_diagonal or two_sided."
            )
        if self.sharing.in_nats and not self.whitening.needs & _OUTPUT_GRAMS:
            raise ConfigError(
                f"sharing {type(self.sharing).__name__} adds up losses of different matrix types, which whitening "
                f"{type(self.whitening).__name__} measures in units that cannot be added. Use whitening=two_sided, or "
                "sharing=criterion, which compares within a matrix type."
            )

    @property
    def needs(self) -> frozenset[Statistic]:
        """The statistics that the strategies ask for."""
        return self.metric_needs | self.sharing.needs | self.allocation.needs

    @property
    def reads_text(self) -> bool:
        """Whether a strategy looks at the calibration windows before the factors exist."""
        return bool(self.needs) or isinstance(self.allocation, MeasuredAllocation)

    @property
    def reads_windows(self) -> bool:
        """Whether any strategy looks at the calibration windows."""
        return self.reads_text or self.update.reads_windows or self.precision.reads_windows

    @property
    def metric_needs(self) -> frozenset[Statistic]:
        """The statistics that the metric, and so every decomposition, depends on."""
        return self.whitening.needs | self.importance.needs

    @property
    def round_needs(self) -> frozenset[Statistic]:
        """The statistics of matrices that every round gathers anew."""
        return self.metric_needs | (self.allocation.needs & OF_MATRICES)


@dataclass(frozen=True, eq=False)
class Preparation:
    """The groups and the calibration windows of a recipe, known before any work.

    `dense` is the model as the sharing strategy sees it. `groups` is None where they depend on weights and statistics.
    """

    dense: LoadedModel
    groups: tuple[WeightGroup, ...] | None
    data: CalibrationData


def probes_of(recipe: Recipe) -> Probes:
    """What the recipe probes; whitenings of others need not say it."""
    found: Probes = getattr(recipe.whitening, "probing", Probes())
    return found


def adapted(recipe: Recipe, dense: LoadedModel) -> Recipe:
    """The recipe with what it leaves to the model decided. ConfigError if it does not fit the model."""
    if not isinstance(recipe.whitening, AdaptsToModel):
        return recipe
    return replace(recipe, whitening=recipe.whitening.for_model(dense))


# Of a recipe that reads no text.
_NO_CALIBRATION = CalibrationData(TokenWindows(ids=torch.empty(0, 0, dtype=torch.long), provenance={}), batch_size=1)

# Cuts the windows of a calibration: by its own method, or one that remembers what was cut before.
CutWindows = Callable[[Calibration, PreTrainedTokenizerBase], TokenWindows]


def cut_windows(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> TokenWindows:
    """The windows of a calibration, cut now."""
    return calibration.windows(tokenizer)


def prepare(
    dense: LoadedModel,
    recipe: Recipe,
    progress: Progress,
    *,
    cut: CutWindows = cut_windows,
    reads_windows: bool = False,
) -> Preparation:
    """Groups and windows, in seconds: settings that do not fit model or text fail here, before the long work.

    Windows are cut if a strategy of the recipe reads them, or if the caller does (`reads_windows`); those that are
    longer than the model's context are shortened, which a note says.
    Raises ConfigError, ModelError or DataError.
    """
    recipe = adapted(recipe, dense)
    with progress.stage(Stage.GROUP):
        dense = seen_by(recipe.sharing, dense)
        recipe.sharing.check(dense.architecture)
        groups = None if recipe.sharing.measured else _groups(dense, recipe)
        recipe.allocation.check(groups or singles(dense.architecture), recipe.retain_ratio, recipe.layout)
    data = _NO_CALIBRATION
    if recipe.reads_windows or reads_windows:
        with progress.stage(Stage.TOKENISE):
            # Calibrations of others need not say where hidden states wait.
            waiting: Activations = getattr(recipe.calibration, "activations", "auto")
            windows = _windows(dense, recipe.calibration, cut, progress)
            data = CalibrationData(windows, recipe.calibration.batch_size, waiting, probes_of(recipe))
    if recipe.reads_text:
        check_gatherable(dense, data, _needs_by_strategy(recipe))
        if isinstance(recipe.allocation, MeasuredAllocation):
            check_measurable(dense, recipe.allocation.measured_by, data.windows)
            recipe.allocation.check_search(_search_identity(dense, recipe, data, kept=1.0))
    recipe.update.check(dense, data)
    recipe.precision.check(dense, data)
    return Preparation(dense, groups, data)


def seen_by(sharing: Sharing, dense: LoadedModel) -> LoadedModel:
    """The model whose matrices the strategy puts into groups: `dense` itself, unless its experts are to be taken apart,
    or the strategy cuts matrices into parts."""
    dense = unfused(dense)
    return sharing.view(dense) if isinstance(sharing, SplitsMatrices) else dense


def _windows(dense: LoadedModel, calibration: Calibration, cut: CutWindows, progress: Progress) -> TokenWindows:
    try:
        asked, calibration = calibration, fitted(calibration, dense)
        if calibration is not asked:
            progress.note(told("calibration", asked, calibration))
        windows = cut(calibration, dense.tokenizer)
        check_windows(windows, calibration)
        check_fits(windows, dense)
    except BsExpError as error:
        error.add_note("This is about the calibration text and its windows (calibration=...).")
        raise
    return windows


def _needs_by_strategy(recipe: Recipe) -> Mapping[str, frozenset[Statistic]]:
    strategies = (recipe.whitening, recipe.importance, recipe.sharing, recipe.allocation)
    return {type(strategy).__name__: strategy.needs for strategy in strategies}


def compress(
    dense: LoadedModel, recipe: Recipe, workspace: Workspace, prepared: Preparation | None = None
) -> CompressedModel:
    """A compressed twin of `dense`, within the recipe's retain ratio; untouched parameters are shared with it.

    Every round of the schedule takes its statistics on the model compressed so far, and factorises the original
    weights.
    """
    progress, recipe = workspace.progress, adapted(recipe, dense)
    prepared = prepared or prepare(dense, recipe, progress)
    whole, dense, data = unfused(dense), prepared.dense, prepared.data
    comparison = _comparison(dense, recipe, data)
    profile = None
    if recipe.allocation.needs - OF_MATRICES:
        with progress.stage(Stage.PROFILE):
            profile = profile_blocks(whole, data, needs=recipe.allocation.needs, workspace=workspace)
    start_of_round = len(workspace.cache.made)
    measures = _measures(dense, dense, data, recipe, recipe.round_needs | recipe.sharing.needs, workspace)
    groups = prepared.groups
    if groups is None:
        measures.gather()
        with progress.stage(Stage.GROUP):
            groups = _groups(dense, recipe, measures)
            recipe.allocation.check(groups, recipe.retain_ratio, recipe.layout)
    rounds = [1.0]
    while True:
        decompositions = decompose_groups(groups, measures, recipe.layout)
        with progress.stage(Stage.ALLOCATE):
            score = None
            if comparison is not None:
                score = PlanScore(
                    comparison=comparison,
                    decompositions=decompositions,
                    keys={group: measures.key(group) for group in groups},
                    identity=_search_identity(dense, recipe, data, kept=rounds[-1]),
                    workspace=workspace,
                )
            spectra = decompositions.spectra
            plan = processes.from_first(partial(next_plan, spectra, profile, rounds[-1], recipe, score))
        with progress.stage(Stage.REPLACE):
            module = twin(dense.module)
            factors = decompositions.truncated(plan)
            replace_matrices(module, dense.architecture, factors, recipe.layout, workspace.cache.folder)
        rounds.append(plan.requested_ratio)
        if plan.requested_ratio <= recipe.retain_ratio:
            break
        told = f"{plan.retain_ratio:.3f} kept, predicted loss {plan.predicted_loss:.4g}"
        progress.note(f"round {len(rounds) - 1}: {told}")
        if isinstance(recipe.update, UpdatesRounds) and recipe.update.every_round:
            _updated(module, dense, whole, recipe.update, plan, data, workspace)
        workspace.cache.drop(workspace.cache.made[start_of_round:])
        start_of_round = len(workspace.cache.made)
        measures = _measures(dense, as_loaded(module, dense), data, recipe, recipe.round_needs, workspace)
    report = _updated(module, dense, whole, recipe.update, plan, data, workspace)
    stored: Mapping[str, Any] = {}
    if not isinstance(recipe.precision, ModelPrecision):
        with progress.stage(Stage.QUANTISE), only_groups_change(module, dense, plan, recipe.precision):
            stored = recipe.precision.apply(module, dense, plan, data, workspace)
    return CompressedModel(
        module=module,
        plan=plan,
        calibration=data.windows.provenance,
        rounds=tuple(rounds[1:]),
        update=report,
        spectra=decompositions.spectra,
        precision=stored,
    )


def _updated(
    module: PreTrainedModel,
    dense: LoadedModel,
    whole: LoadedModel,
    update: Update,
    plan: RankPlan,
    data: CalibrationData,
    workspace: Workspace,
) -> Mapping[str, Any]:
    """Applies the update to the compressed model; its report."""
    with workspace.progress.stage(Stage.UPDATE), only_factors_change(module, whole, update):
        report = update.apply(module, dense, plan, data, workspace)
        processes.same_values(module, unlike=dense.module)
    return report


def measured_problem(prepared: Preparation, recipe: Recipe, workspace: Workspace) -> SharingProblem:
    """The problem that a measured sharing strategy is given, for an analysis; statistics come from the cache."""
    recipe = adapted(recipe, prepared.dense)
    dense, needs = prepared.dense, recipe.round_needs | recipe.sharing.needs
    return _sharing_problem(dense, recipe, _measures(dense, dense, prepared.data, recipe, needs, workspace))


def _groups(dense: LoadedModel, recipe: Recipe, measures: GroupMeasures | None = None) -> tuple[WeightGroup, ...]:
    groups = recipe.sharing.groups(_sharing_problem(dense, recipe, measures))
    check_groups(groups, dense.architecture, recipe.sharing)
    return groups


def _sharing_problem(dense: LoadedModel, recipe: Recipe, measures: GroupMeasures | None = None) -> SharingProblem:
    return SharingProblem(dense.architecture, recipe.retain_ratio, recipe.layout, measures)


def _measures(
    dense: LoadedModel,
    current: LoadedModel,
    data: CalibrationData,
    recipe: Recipe,
    needs: frozenset[Statistic],
    workspace: Workspace,
) -> GroupMeasures:
    return GroupMeasures(
        dense=dense,
        current=current,
        data=data,
        needs=needs,
        whitening=recipe.whitening,
        importance=recipe.importance,
        workspace=workspace,
    )


def _comparison(dense: LoadedModel, recipe: Recipe, data: CalibrationData) -> Comparison | None:
    """The comparison with the dense model by which the allocation measures plans; None if it measures none."""
    if not isinstance(recipe.allocation, MeasuredAllocation):
        return None
    return Comparison(dense=dense, data=data, objective=recipe.allocation.measured_by)


def _search_identity(dense: LoadedModel, recipe: Recipe, data: CalibrationData, *, kept: float) -> dict[str, Any]:
    """What the scores of plans depend on besides the plans; `kept` is the share that earlier rounds left."""
    strategies = ("sharing", "whitening", "importance", "layout", "schedule")
    return {
        "model": dense.fingerprint,
        "windows": data.windows.provenance["sha256"],
        "batch_size": data.batch_size,
        **{name: identity(getattr(recipe, name)) for name in strategies},
        "retain_ratio": recipe.retain_ratio,
        "kept": kept,
    }


def next_plan(
    spectra: tuple[Spectrum, ...],
    profile: LayerProfile | None,
    current: float,
    recipe: Recipe,
    score: Score | None = None,
) -> RankPlan:
    """The plan of the next round, from the share kept so far."""

    def plan_at(ratio: float) -> RankPlan:
        return recipe.allocation.allocate(AllocationProblem(spectra, ratio, recipe.layout, profile, score))

    def loss_at(ratio: float) -> float:
        if score is None:
            return plan_at(ratio).predicted_loss
        # Prediction alone: a search at every ratio that a schedule considers would measure for hours.
        problem = AllocationProblem(spectra, ratio, recipe.layout, profile)
        return make_plan(problem, share_out(problem, [1.0] * len(spectra))).predicted_loss

    ratio = recipe.schedule.next_ratio(current, recipe.retain_ratio, loss_at)
    check_ratio(ratio, current, recipe.retain_ratio, recipe.schedule)
    plan = plan_at(ratio)
    check_plan(plan, spectra, ratio, recipe.layout, recipe.allocation)
    return plan
