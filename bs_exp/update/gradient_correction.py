"""What truncation cut off is projected onto the gradient of the loss, added, and truncated again."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from bs_exp import processes
from bs_exp.calibration.group_statistics import CalibrationStats, calibrate, check_gatherable
from bs_exp.calibration.loss import CalibrationLoss, check_windows, drawn, shared_out
from bs_exp.corpora.sampling import hold_out
from bs_exp.corpora.windows import part_of
from bs_exp.linalg.cholesky import damped_root
from bs_exp.linalg.decomposition import needs_left_root
from bs_exp.linalg.gradient_step import corrected_factors
from bs_exp.models.architecture import weight_of
from bs_exp.models.fingerprint import as_loaded
from bs_exp.models.surgery import exchange_factors, factors_of
from bs_exp.protocols import StoredFactors
from bs_exp.types import CalibrationData, LoadedModel, Metric, PlannedGroup, RankPlan, Statistic
from bs_exp.validation import check_at_least, check_number, check_seed, check_share
from bs_exp.workspace import Workspace

KIND = "gradient_correction"


@dataclass(frozen=True, kw_only=True)
class GradientCorrection:
    """`corrections` times: all weights move along the loss's gradient as far as truncation went against it.

    With the truncated weights `W'`, the dense ones `W` and the gradient G of the token loss at `W'`, each matrix gets
    the truncation, at its rank, of `W' + (<G, W - W'> / <G, G>) G`, in the metric of the compressed model's inputs
    (SVD-LLM's, damped by `ridge`). Gradient and Grams are taken anew every time; the gradient on `windows` windows,
    drawn by `seed` and the number of the correction (None: all): few windows have a gradient of low rank, of which
    truncation leaves more. A group with a shared basis is truncated as one matrix; corrections of its layers stay.

    A share `holdout` of the windows gives no gradient; the factors with the least loss on it are kept, which may be
    those from before. 0 keeps the last ones, as the paper does.

    `every_round`: with a schedule of several rounds it corrects the factors after each round, so that the next one's
    statistics are those of the corrected model; the original weights are then factorised as ever.

    ZS-SVD (2602.02848), its correction. Differences from the official code: there a correction is followed by another
    selection of ranks, the truncated weight is the corrected one in every stage, and modules at break-even or above get
    the dense weight; here ranks stay those of the plan.
    """

    corrections: int
    windows: int | None
    ridge: float
    holdout: float
    every_round: bool
    seed: int

    reads_windows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_at_least(1, corrections=self.corrections, windows=self.windows)
        check_number(0.0, ridge=self.ridge)
        check_share(holdout=self.holdout)
        check_seed(self.seed)

    def check(self, dense: LoadedModel, data: CalibrationData) -> None:
        """ConfigError for a model without a loss, DataError if there are too few windows to hold some out."""
        check_gatherable(dense, data, {"update=gradient_correction": {Statistic.LOSS_GRADIENT}})
        check_windows(
            KIND, windows=self.windows, holdout=self.holdout, seed=self.seed, data=data, otherwise="set holdout=0"
        )

    def apply(
        self,
        compressed: PreTrainedModel,
        dense: LoadedModel,
        plan: RankPlan,
        data: CalibrationData,
        workspace: Workspace,
    ) -> Mapping[str, Any]:
        """Corrects in place; reports the cost, and the held-out loss in nats per token after every correction."""
        groups = [planned for planned in plan.groups if planned.rank is not None]
        if not groups:
            workspace.progress.note("correction: there are no factors to correct")
            return {"strategy": KIND, "corrections": 0, "seconds": 0.0}
        start = time.perf_counter()
        training, held_out = data.windows, data.windows.ids[:0]
        if self.holdout:
            kept, held = hold_out(len(training.ids), self.holdout, self.seed)
            training, held_out = part_of(data.windows, kept, name="corrected on"), data.windows.ids[held]
        loss = CalibrationLoss(dense, data, held_out)
        history = [loss(compressed)]
        best = self._stored(compressed, dense, groups)
        for number in range(self.corrections):
            gathered = len(workspace.cache.made)
            self._correct(compressed, dense, groups, replace(data, windows=training), number, workspace)
            processes.same_values(compressed, unlike=dense.module)
            # Statistics of a model that is gone.
            workspace.cache.drop(workspace.cache.made[gathered:])
            history.append(loss(compressed))
            if not len(held_out) or history[-1] < min(history[:-1]):
                best = self._stored(compressed, dense, groups)
        for factors in best:
            exchange_factors(compressed, dense.architecture, factors, workspace.cache.folder)
        report: dict[str, Any] = {
            "strategy": KIND,
            "corrections": self.corrections,
            "kept": history.index(min(history)) if len(held_out) else self.corrections,
            "seconds": round(time.perf_counter() - start, 3),
        }
        if len(held_out):
            report["held_out_loss"] = history
            told = f"held-out loss {history[0]:.4f} -> {min(history):.4f} nats per token after {report['kept']}"
            workspace.progress.note(f"correction: {told} of {self.corrections}")
        return report

    def _correct(
        self,
        compressed: PreTrainedModel,
        dense: LoadedModel,
        groups: Sequence[PlannedGroup],
        data: CalibrationData,
        number: int,
        workspace: Workspace,
    ) -> None:
        """One correction of all groups, from statistics of the model as it is."""
        source = as_loaded(compressed, dense)
        grams = calibrate(source, shared_out(data), needs={Statistic.GRAM}, workspace=workspace)
        chosen = shared_out(drawn(data, self.windows, seed=self.seed, number=number))
        gradients = calibrate(source, chosen, needs={Statistic.LOSS_GRADIENT}, workspace=workspace)
        for planned in workspace.progress.track(groups, label="correcting", total=len(groups)):
            candidate = self._corrected(compressed, dense, planned, grams, gradients)
            exchange_factors(compressed, dense.architecture, candidate, workspace.cache.folder)

    @torch.no_grad()
    def _corrected(
        self,
        compressed: PreTrainedModel,
        dense: LoadedModel,
        planned: PlannedGroup,
        grams: CalibrationStats,
        gradients: CalibrationStats,
    ) -> StoredFactors:
        group = planned.group
        stored = factors_of(compressed, dense.architecture, group).on(dense.device)
        present = stored.layout.restore(stored)
        matrices = [dense.architecture.by_position[group.matrix, layer] for layer in group.layers]
        weight = torch.cat([weight_of(dense.module, m).to(dense.device).double() for m in matrices], dim=1)
        product = present.basis @ torch.cat([present.coefficients[layer] for layer in group.layers], dim=1)
        whole = product
        if present.corrections:
            own = [down @ up for down, up in (present.corrections[layer] for layer in group.layers)]
            whole = product + torch.cat(own, dim=1)
        gram, gradient = grams.of(group, dense.device).gram, gradients.of(group, dense.device).loss_gradient
        assert gram is not None and gradient is not None
        whitener, added = damped_root(gram, ridge=self.ridge, needed=needs_left_root(replace(group, correction=0)))
        metric = Metric(whitener=whitener, ridge=added)
        found = corrected_factors(group, weight - whole, product, gradient, metric, stored.rank)
        arranged = stored.layout.arrange(replace(found, group=group, corrections=present.corrections))
        return arranged.in_dtype(stored.basis.dtype)

    def _stored(
        self, compressed: PreTrainedModel, dense: LoadedModel, groups: Sequence[PlannedGroup]
    ) -> list[StoredFactors]:
        """All factors as they are; whoever exchanges them puts new Parameters in their place."""
        return [factors_of(compressed, dense.architecture, planned.group) for planned in groups]
