"""Gains on the directions that truncation kept, folded into the factors."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel

from bs_exp.calibration.block_inputs import without_experts
from bs_exp.calibration.site_inputs import inputs_of
from bs_exp.calibration.walk import check_block_walk
from bs_exp.corpora.sampling import hold_out
from bs_exp.errors import CalibrationError, ConfigError, DataError
from bs_exp.linalg.cholesky import cholesky_whitener
from bs_exp.linalg.decomposition import decompose, truncate
from bs_exp.linalg.gains import GainLoss, validated_gains
from bs_exp.linalg.least_squares import InputPairs, squared_loss
from bs_exp.models.architecture import weight_of
from bs_exp.models.block_stream import BlockStream, Waiting
from bs_exp.models.blocks import Blocks
from bs_exp.models.model_inputs import feeder
from bs_exp.models.surgery import exchange_factors, factors_of
from bs_exp.types import CalibrationData, LoadedModel, Metric, RankPlan, WeightGroup
from bs_exp.validation import check_number, check_seed, check_share
from bs_exp.workspace import Workspace

KIND = "lens"
# Of the whitening that finds the directions.
_RIDGE = 1e-12


@dataclass(frozen=True, kw_only=True)
class Lens:
    """One gain for every direction of a truncated matrix, towards the dense layer's outputs; nothing more is stored.

    Block by block, on the inputs X that the corrected blocks before give: the gains g of least
    `||X B diag(g) C - X_f W||_F`, with X_f the dense model's inputs, held near 1 by `ridge`. Directions are the
    singular ones of the product in the metric of X; of a shared basis they are its columns, and every layer has gains
    of its own. A gain is taken only if it lowers the loss on the share `holdout` of the windows, on which it was not
    fitted (`validated_gains`), and the gains of a matrix only if they lower that loss as the numbers are stored.

    LENS, as far as secondary sources tell: calibrated gains on validated directions, folded into the left factor. How
    it fits and validates them is not known; this is the least-squares reading.
    """

    ridge: float
    holdout: float
    seed: int

    reads_windows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number(0.0, ridge=self.ridge)
        check_share(holdout=self.holdout)
        check_seed(self.seed)
        if self.holdout == 0.0:
            raise ConfigError("holdout must be above 0: gains are validated on windows that they were not fitted on.")

    def check(self, dense: LoadedModel, data: CalibrationData) -> None:
        """ModelError if blocks cannot be run one at a time, DataError if there are no windows to hold out."""
        if len(data.windows.ids) < 2:
            raise DataError(
                f"update=lens needs at least 2 calibration windows, one of them held out, got {len(data.windows.ids)}. "
                "Raise calibration.num_sequences, or set update=none."
            )
        check_block_walk(dense, data, "So gains cannot be fitted block by block: use update=none, or update=recover.")

    def apply(
        self,
        compressed: PreTrainedModel,
        dense: LoadedModel,
        plan: RankPlan,
        data: CalibrationData,
        workspace: Workspace,
    ) -> Mapping[str, Any]:
        """Folds gains in place; reports the held-out loss before and after, summed over matrices, and the cost."""
        chosen = [planned.group for planned in plan.groups if planned.rank is not None]
        groups = without_experts(chosen, KIND, workspace.progress)
        if not groups:
            workspace.progress.note("lens: there are no factors to correct")
            return {"strategy": KIND, "directions": 0, "changed": 0, "seconds": 0.0}
        start = time.perf_counter()
        work = _Work(self, compressed, dense, data, workspace)
        layers = range(len(dense.architecture.blocks))
        for layer in workspace.progress.track(layers, label="fitting gains", total=len(layers)):
            work.correct(layer, [group for group in groups if layer in group.layers])
        report = work.report() | {"seconds": round(time.perf_counter() - start, 3)}
        workspace.progress.note(
            f"lens: {report['changed']} of {report['directions']} directions have gains, held-out loss "
            f"{report['loss_before']:.4g} -> {report['loss_after']:.4g}"
        )
        return report


@dataclass(eq=False)
class _Work:
    """Gains under way: both models' hidden states in front of the next block."""

    settings: Lens
    compressed: PreTrainedModel
    dense: LoadedModel
    data: CalibrationData
    workspace: Workspace
    _counts: dict[str, int] = field(default_factory=lambda: {"directions": 0, "changed": 0})
    _losses: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        feed = feeder(self.dense, self.data.windows.feeding)
        waiting = Waiting(self.data.activations, self.workspace.cache.folder)

        def stream(model: LoadedModel) -> BlockStream:
            batches = (feed.inputs(ids.to(model.device)) for ids in self.data.batches)
            return BlockStream(Blocks(model), batches, waiting)

        self._current, self._original = stream(replace(self.dense, module=self.compressed)), stream(self.dense)
        count = len(self.data.windows.ids)
        self._held = torch.zeros(count, dtype=torch.bool)
        self._held[hold_out(count, self.settings.holdout, self.settings.seed)[1]] = True

    @torch.no_grad()
    def correct(self, layer: int, groups: Sequence[WeightGroup]) -> None:
        """Folds gains into the matrices of a block, and takes both models' states behind it."""
        sites = {(m := self.dense.architecture.by_position[g.matrix, layer]).input_site: m.module for g in groups}
        moments = self._moments(layer, sites)
        for group in groups:
            self._fold(group, layer, *moments[self.dense.architecture.by_position[group.matrix, layer].input_site])
        for batch in range(len(self._current)):
            self._current.advance(batch, self._current.run(layer, batch))

    def report(self) -> dict[str, Any]:
        before, after = (sum(pair[i] for pair in self._losses) ** 0.5 for i in (0, 1))
        return {"strategy": KIND, **self._counts, "loss_before": before, "loss_after": after}

    def _moments(self, layer: int, sites: Mapping[str, str]) -> dict[str, list[InputPairs]]:
        """By site, the moments of the windows that gains are fitted on and of the held-out ones."""
        found: dict[str, list[InputPairs]] = {}
        for batch, held in enumerate(self._held.split(self.data.batch_size)):
            with inputs_of(self.dense.module, sites) as wanted:
                self._original.advance(batch, self._original.run(layer, batch))
            with inputs_of(self.compressed, sites) as seen:
                self._current.run(layer, batch)
            for site, name in sites.items():
                if site not in seen or site not in wanted or seen[site].shape != wanted[site].shape:
                    raise CalibrationError(
                        f"Lens: {name} does not read the same tokens in the dense and in the compressed model. Use "
                        "update=none."
                    )
                parts = [
                    InputPairs.of(_windows(seen[site], chosen), _windows(wanted[site], chosen))
                    for chosen in (~held, held)
                ]
                before = found.get(site)
                found[site] = parts if before is None else [a + b for a, b in zip(before, parts, strict=True)]
        return found

    def _fold(self, group: WeightGroup, layer: int, fitted: InputPairs, held_out: InputPairs) -> None:
        matrix, device = self.dense.architecture.by_position[group.matrix, layer], self.dense.device
        weight = weight_of(self.dense.module, matrix).to(device).double()
        stored = factors_of(self.compressed, self.dense.architecture, group).on(device)
        present = stored.layout.restore(stored)
        basis, coefficients = present.basis, present.coefficients[layer]
        own = present.corrections.get(layer)
        fixed = None if own is None else own[0] @ own[1]

        def loss(product: Tensor) -> float:
            return squared_loss(product if fixed is None else product + fixed, weight, held_out, 1.0)

        if alone := group.size == 1 and own is None:
            whitener, added = cholesky_whitener(fitted.gram + held_out.gram, ridge=_RIDGE)
            metric = Metric(whitener=whitener, ridge=added)
            factors = truncate(decompose(group, basis @ coefficients, metric), stored.rank)
            basis, coefficients = factors.basis, factors.coefficients[layer]
        fits, held = (GainLoss.of(basis, coefficients, weight, pairs, fixed) for pairs in (fitted, held_out))
        gains = validated_gains(fits, held, ridge=self.settings.ridge)
        new = {layer: gains[:, None] * coefficients}
        candidate = (
            stored.layout.arrange(replace(present, basis=basis, coefficients=new))
            if alone
            else stored.layout.with_coefficients(stored, new)
        ).in_dtype(stored.basis.dtype)
        rounded = stored.layout.restore(candidate)
        before = loss(present.basis @ present.coefficients[layer])
        after = loss(rounded.basis @ rounded.coefficients[layer])
        self._counts["directions"] += len(gains)
        if after < before:  # not so if it overflows the dtype
            exchange_factors(self.compressed, self.dense.architecture, candidate, self.workspace.cache.folder)
            self._counts["changed"] += int((gains != 1.0).sum())
        self._losses.append((before, min(before, after)))


def _windows(rows: Tensor, chosen: Bool[Tensor, " windows"]) -> Tensor:
    """Rows of the chosen windows, in fp64 on a CPU."""
    found: Tensor = rows.unflatten(0, (len(chosen), -1))[chosen.to(rows.device)].flatten(0, 1)
    return found.double() if rows.device.type == "cpu" else found
