"""The coefficients are refitted by least squares; the bases stay."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bs_exp.calibration.block_inputs import gather_pairs, streams_of
from bs_exp.calibration.group_statistics import calibrate
from bs_exp.calibration.rare_experts import wanted_tokens
from bs_exp.errors import CalibrationError, ConfigError
from bs_exp.linalg.least_squares import InputPairs, closed_form_beta, refit_coefficients, squared_loss
from bs_exp.models.architecture import weight_of
from bs_exp.models.fingerprint import as_loaded
from bs_exp.models.mapped import release
from bs_exp.models.model_inputs import feeder
from bs_exp.models.offload import is_offloaded
from bs_exp.models.surgery import exchange_factors, factors_of, twin
from bs_exp.protocols import StoredFactors
from bs_exp.types import CalibrationData, LoadedModel, RankPlan, Statistic, WeightGroup, WeightMatrix
from bs_exp.validation import check_choice, check_number, check_unit, is_number, shown
from bs_exp.workspace import Workspace

MODES = ("one_shot", "sequential")
TARGETS = ("compressed_inputs", "dense_outputs", "mixed")
INPUTS = ("compressed", "original")
GRAMS = ("group", "layer")


@dataclass(frozen=True, kw_only=True)
class Refit:
    """Coefficients C of least `||X B C - T||_F`, the basis B (of a single pivoted matrix its span) being as it is.

    `inputs`: X are those of the compressed model, or `original`: the dense model's. `target`: T is `X W`
    (compressed_inputs), or the dense model's own outputs `X_f W` (dense_outputs), or `(1 - beta) X W + beta X_f W`
    (mixed: the objective of SAES-SVD, 2602.03051; `beta` null is its closed form, taken on the present basis).
    `gram`: X is stacked over the layers of a group, or every layer has its own. `mode`: all layers on the model as
    truncation left it, or block by block on what the refitted blocks before give. A refit that does not lower the
    loss, as the stored numbers have it, is not taken.

    The defaults are the update of the official Basis Sharing code (one_shot, compressed_inputs, group), which the paper
    (2410.03765, section 4.1) leaves open; SVD-LLM's code is sequential with the same target.
    """

    mode: str
    inputs: str
    target: str
    beta: float | None
    gram: str
    ridge: float
    below: float | None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        check_choice("inputs", self.inputs, INPUTS)
        check_choice("target", self.target, TARGETS)
        check_choice("gram", self.gram, GRAMS)
        check_number(0.0, ridge=self.ridge)
        if self.below is not None and not (is_number(self.below) and 0.0 < self.below <= 1.0):
            raise ConfigError(f"below must be above 0 and at most 1, or null for always, got {shown(self.below)}.")
        check_unit(", or null for the closed form", beta=self.beta)
        if self.beta is not None and self.target != "mixed":
            raise ConfigError(f"beta is only read with target=mixed, got beta={self.beta} and target={self.target}.")
        if self.mode == "sequential" and self.inputs == "original":
            raise ConfigError(
                "mode must be one_shot with inputs=original: the dense model's inputs do not depend on the refit."
            )
        if self.mode == "sequential" and self.gram == "group":
            raise ConfigError(
                "mode=sequential must have gram=layer: when the first layer of a group is refitted, the inputs of its "
                "other layers are not known yet."
            )
        if self.inputs == "original" and self.target == "mixed":
            raise ConfigError("target=mixed needs inputs=compressed: on the original inputs all targets are the same.")

    @property
    def streams(self) -> bool:
        """Whether blocks are run one at a time; else Grams of one model, which the cache may have, are all it takes."""
        return self.mode == "sequential" or (self.inputs == "compressed" and self.target != "compressed_inputs")

    @property
    def reads_windows(self) -> bool:
        """Always: the refit is made of moments of the layers' inputs."""
        return True

    @property
    def is_traceable(self) -> bool:
        """Whether an estimate can run it: Grams that come from the cache would be unpacked row by row."""
        return self.streams

    def check(self, dense: LoadedModel, data: CalibrationData) -> None:
        """An error if windows cannot be fed to the model."""
        feeder(dense, data.windows.feeding).inputs(data.windows.ids[:1])

    def apply(
        self,
        compressed: PreTrainedModel,
        dense: LoadedModel,
        plan: RankPlan,
        data: CalibrationData,
        workspace: Workspace,
    ) -> Mapping[str, Any]:
        """Refits in place; reports the loss `||X B C - T||_F` before and after, by group and in all, and the cost."""
        report: dict[str, Any] = {"strategy": "refit", "applied": False, "seconds": 0.0}
        if self.below is not None and plan.requested_ratio > self.below:
            workspace.progress.note(
                f"refit: not at a retained share of {plan.requested_ratio:g}, above update.below={self.below:g}"
            )
            return report
        groups = [planned.group for planned in plan.groups if planned.rank is not None]
        if not groups:
            workspace.progress.note("refit: there are no factors to refit")
            return report
        start = time.perf_counter()
        work = _Work(self, compressed, dense, workspace.cache.folder)
        if self.streams:
            self._stream(work, groups, data, workspace)
        else:
            self._from_grams(work, groups, data, workspace)
        report |= work.report() | {"applied": True, "seconds": round(time.perf_counter() - start, 3)}
        workspace.progress.note(_summary(report))
        return report

    def _from_grams(
        self,
        work: _Work,
        groups: Sequence[WeightGroup],
        data: CalibrationData,
        workspace: Workspace,
    ) -> None:
        """All layers from the Grams of one pass, of which one group's are in memory if the cache has a folder."""
        source = work.dense
        if self.inputs == "compressed":
            source = as_loaded(work.compressed, source)
        stats = calibrate(source, data, needs={Statistic.GRAM}, workspace=workspace)
        for group in workspace.progress.track(groups, label="refitting", total=len(groups)):
            device = work.device(group)
            if self.gram == "group":
                gram = stats.of(group, device).gram
                assert gram is not None
                work.refit(group, group.layers, InputPairs(gram))
                continue
            for layer in group.layers:
                gram = stats.of(replace(group, layers=(layer,)), device).gram
                assert gram is not None
                work.refit(group, (layer,), InputPairs(gram))

    def _stream(self, work: _Work, groups: Sequence[WeightGroup], data: CalibrationData, workspace: Workspace) -> None:
        """Block by block: gathers one block's moments, refits, and carries the windows on.

        A model whose blocks cannot be run one at a time runs from its beginning for each of them, which a note says.
        An expert is refitted on the tokens that are sent to it in both models, if they are as many as it has channels.
        """
        stream = streams_of(work.dense, data, workspace)
        # In one shot every layer reads what truncation left, so refitted factors go into another copy of the structure.
        module = twin(work.compressed) if self.mode == "one_shot" else work.compressed
        current = stream(replace(work.dense, module=module))
        original = None if self.target == "compressed_inputs" else stream(work.dense)
        layers = range(len(work.dense.architecture.blocks))
        pending: dict[WeightGroup, InputPairs] = {}
        left = 0
        for layer in workspace.progress.track(layers, label="refitting", total=len(layers)):
            here = [(group, place) for group in groups for place in group.within(layer)]
            matrices = [work.matrix(group, place) for group, place in here]
            modules = {matrix.input_site: matrix.module for matrix in matrices}
            found = gather_pairs(
                (module, current),
                None if original is None else (work.dense.module, original),
                modules,
                layer,
                advance=self.mode == "one_shot",
                least={matrix.input_site: wanted_tokens(matrix) for matrix in matrices if matrix.expert is not None},
            )
            for (group, place), matrix in zip(here, matrices, strict=True):
                pairs = found.get(matrix.input_site)
                left += pairs is None
                if self.gram == "layer" and pairs is not None:
                    work.refit(group, (place,), pairs)
                elif self.gram == "group":
                    if pairs is not None:
                        pending[group] = pending[group] + pairs if group in pending else pairs
                    if place == group.layers[-1] and group in pending:
                        work.refit(group, group.layers, pending.pop(group))
            if self.mode == "sequential":
                current.pass_on(layer)
        if left:
            workspace.progress.note(
                f"refit: {left} matrices of routed experts are not refitted on tokens of their own, of which fewer are "
                "sent to them in both models than they have channels"
            )


@dataclass(eq=False)
class _Work:
    """A refit under way."""

    settings: Refit
    compressed: PreTrainedModel
    dense: LoadedModel
    folder: Path | None
    _losses: dict[WeightGroup, list[tuple[float, float]]] = field(default_factory=dict)  # squared, before and after
    _betas: dict[WeightGroup, list[float]] = field(default_factory=dict)
    _kept: int = 0

    def matrix(self, group: WeightGroup, layer: int) -> WeightMatrix:
        return self.dense.architecture.by_position[group.matrix, layer]

    def device(self, group: WeightGroup) -> torch.device:
        weight = weight_of(self.dense.module, self.matrix(group, group.layers[0]))
        return self.dense.device if is_offloaded(self.dense.module) else weight.device

    @torch.no_grad()
    def refit(self, group: WeightGroup, layers: Sequence[int], inputs: InputPairs) -> None:
        """Refits some layers of a group on their inputs, if that lowers the loss of the numbers that are stored."""
        architecture, ridge = self.dense.architecture, self.settings.ridge
        device = self.device(group)
        stored = factors_of(self.compressed, architecture, group).on(device)
        layout = stored.layout
        present = layout.restore(stored)
        weights = [weight_of(self.dense.module, self.matrix(group, i)) for i in layers]
        weight = torch.cat([part.to(device).double() for part in weights], dim=1)
        release(weights)

        def columns(blocks: Mapping[int, Tensor]) -> Tensor:
            return torch.cat([blocks[i] for i in layers], dim=1)

        def loss(factors: StoredFactors) -> float:
            plain = layout.restore(factors)
            product = plain.basis @ columns(plain.coefficients)
            return squared_loss(product if fixed is None else product + fixed, weight, inputs, beta)

        # Corrections of single layers stay; to write them down again changes none of their bits.
        own = {layer: down @ up for layer, (down, up) in present.corrections.items()}
        fixed = columns(own) if own else None
        beta = self._beta(present.basis, weight, inputs, fixed)
        new = refit_coefficients(
            present.basis, columns(present.coefficients), weight, inputs, beta=beta, ridge=ridge, fixed=fixed
        )
        parts = dict(zip(layers, new.split(group.d_out, dim=1), strict=True))
        candidate = layout.with_coefficients(stored, parts).in_dtype(stored.basis.dtype)
        before, after = loss(stored), loss(candidate)
        if not math.isfinite(before):
            raise CalibrationError(
                f"Refit: the inputs or factors of {group.name}, layers {list(layers)}, hold NaN or infinite values on "
                "the calibration text. Load the model in another dtype (model.dtype=float32 or bfloat16), or set "
                "update=none."
            )
        if after < before:  # not so if it overflows the dtype
            exchange_factors(self.compressed, architecture, candidate, self.folder)
        else:
            after = before
            self._kept += 1
        self._losses.setdefault(group, []).append((before, after))
        self._betas.setdefault(group, []).append(beta)

    def report(self) -> dict[str, Any]:
        """Losses by group, in order; a total is the root of the sum of squares."""
        totals = [sum(pair[i] for pairs in self._losses.values() for pair in pairs) for i in (0, 1)]
        report: dict[str, Any] = {
            "loss_before": math.sqrt(totals[0]),
            "loss_after": math.sqrt(totals[1]),
            "left_as_they_were": self._kept,
            "groups": [
                {
                    "group": group.name,
                    "loss_before": math.sqrt(sum(before for before, _ in pairs)),
                    "loss_after": math.sqrt(sum(after for _, after in pairs)),
                }
                for group, pairs in self._losses.items()
            ],
        }
        if self.settings.target == "mixed":
            for entry, betas in zip(report["groups"], self._betas.values(), strict=True):
                entry["beta"] = betas
        return report

    def _beta(self, basis: Tensor, weight: Tensor, inputs: InputPairs, fixed: Tensor | None) -> float:
        match self.settings.target:
            case "compressed_inputs":
                return 0.0
            case "dense_outputs":
                return 1.0
            case _ if self.settings.beta is not None:
                return self.settings.beta
            case _:
                return closed_form_beta(basis, weight, inputs, ridge=self.settings.ridge, fixed=fixed)


def _summary(report: Mapping[str, Any]) -> str:
    kept = f", {report['left_as_they_were']} fits left as they were" if report["left_as_they_were"] else ""
    return f"refit: loss {report['loss_before']:.4g} -> {report['loss_after']:.4g} on the calibration windows{kept}"
