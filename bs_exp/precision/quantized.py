"""Factors, and matrices that stayed dense, in whole numbers of few bits, rounded with error feedback."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bs_exp.calibration.group_statistics import CalibrationStats
from bs_exp.errors import CalibrationError, ConfigError, ModelError
from bs_exp.linalg.least_squares import InputPairs, refit_coefficients
from bs_exp.linalg.quantization import Grid, fit_grid, output_loss, round_with_feedback
from bs_exp.models.adapters import has_adapters
from bs_exp.models.blocks import Blocks
from bs_exp.models.model_inputs import feeder
from bs_exp.models.modeling_basis_sharing import BITS, FactorisedLinear, Packed, Precision
from bs_exp.models.quantizing import (
    declare_precision,
    factorised_layer,
    packed,
    read_weight,
    reads,
    scales_are_free,
    store_dense,
    store_factors,
)
from bs_exp.precision.inputs import Grams, NoGrams, PassGrams, StreamedGrams, by_layer, group_gram, pass_statistics
from bs_exp.types import CalibrationData, LoadedModel, RankPlan, WeightGroup, WeightMatrix
from bs_exp.validation import check_at_least, check_choice, check_number, shown
from bs_exp.workspace import Workspace

INPUTS = ("sequential", "one_shot")
ORDERS = ("natural", "importance")


@dataclass(frozen=True, kw_only=True)
class QuantizedWeights:
    """Every matrix of the plan's groups in `bits` bits, by row (output channel), in groups of `group_size` columns.

    First the basis is rounded, in the Gram of what it reads (of all layers that share it); then the coefficients are
    refitted to the rounded basis (`refit`), by least squares towards the product that they had; then they are rounded,
    in the Gram of what the rounded basis gives. Rounding is GPTQ's (2210.17323) with `error_feedback`, columns in
    `order`, else to the nearest. `inputs`: those of each block behind the blocks that were quantised before it
    (sequential), or those of the model before it is quantised (one_shot); those of a shared basis are always the
    latter, since its later layers are not reached yet. Corrections of single layers, biases, and what is no matrix of a
    group stay as they are.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    error_feedback: bool
    order: str
    damping: float
    inputs: str
    refit: bool
    ridge: float

    def __post_init__(self) -> None:
        if self.bits not in BITS or isinstance(self.bits, bool):
            raise ConfigError(f"bits must be one of {', '.join(map(str, BITS))}, got {shown(self.bits)}.")
        check_at_least(1, group_size=self.group_size)
        check_choice("order", self.order, ORDERS)
        check_choice("inputs", self.inputs, INPUTS)
        check_number(0.0, damping=self.damping)
        check_number(0.0, ridge=self.ridge)

    @property
    def reads_windows(self) -> bool:
        """Whether inputs count: for the feedback of errors, or for the refit."""
        return self.error_feedback or self.refit

    @property
    def stored(self) -> Precision:
        return Precision(self.bits, self.group_size, self.symmetric)

    def check(self, dense: LoadedModel, data: CalibrationData) -> None:
        """Blocks that can be run one at a time, where that is needed."""
        if not (self.reads_windows and self.inputs == "sequential"):
            return
        batches = data.windows.ids.split(1)[:2]
        feed = feeder(dense, data.windows.feeding)
        first, *second = (feed.inputs(ids.to(dense.device)) for ids in batches)
        try:
            Blocks(dense).check(first, second[0] if second else first)
        except ModelError as error:
            raise ModelError(f"{error} To quantise it use precision.inputs=one_shot.") from error

    @torch.no_grad()
    def apply(
        self,
        compressed: PreTrainedModel,
        dense: LoadedModel,
        plan: RankPlan,
        data: CalibrationData,
        workspace: Workspace,
    ) -> Mapping[str, Any]:
        """Quantises in place; reports by how much the outputs of the matrices change on their inputs, and the time."""
        if has_adapters(compressed):
            raise ConfigError(
                "precision: the factors have adapters that are not merged, which would belong to other factors. Set "
                "update.merge=true, or precision=none."
            )
        start = time.perf_counter()
        work = _Work(self, compressed, dense)
        groups = {planned.group: planned.rank for planned in plan.groups}
        if self.reads_windows and any(rank is not None and group.size > 1 for group, rank in groups.items()):
            work.statistics = pass_statistics(compressed, dense, data, workspace)
        grams = self._grams(compressed, dense, data, workspace)
        here = by_layer(groups)
        for layer in grams.blocks():
            for group in here.get(layer, ()):
                for place in group.within(layer):
                    work.quantise(group, place, grams)
        declare_precision(compressed, self.stored, work.dense_layers, plan.layout)
        report = {"strategy": "quantized", "bits": self.bits, **work.report()}
        report["seconds"] = round(time.perf_counter() - start, 3)
        workspace.progress.note(
            f"precision: {self.bits} bits; outputs of the matrices change by {report['relative_error']:.2%} on their "
            "calibration inputs"
        )
        return report

    def _grams(
        self, compressed: PreTrainedModel, dense: LoadedModel, data: CalibrationData, workspace: Workspace
    ) -> Grams:
        if not self.reads_windows:
            return NoGrams(dense)
        kind = StreamedGrams if self.inputs == "sequential" else PassGrams
        return kind(compressed, dense, data, workspace)


@dataclass(frozen=True, eq=False)
class _Basis:
    """The basis of a group, rounded: as it is stored, and what the coefficients read, rounded and before.

    `scales` are those by which components were multiplied in the basis, and so must be divided by in the coefficients.
    """

    stored: Packed
    rounded: Tensor
    before: Tensor
    scales: Tensor


@dataclass(eq=False)
class _Work:
    """A quantisation under way."""

    settings: QuantizedWeights
    compressed: PreTrainedModel
    dense: LoadedModel
    statistics: CalibrationStats | None = None  # of the model before, where a basis is shared
    dense_layers: list[str] = field(default_factory=list)
    _bases: dict[WeightGroup, _Basis] = field(default_factory=dict)
    _losses: list[tuple[float, float]] = field(default_factory=list)  # of the error, and of the outputs themselves

    def matrix(self, group: WeightGroup, layer: int) -> WeightMatrix:
        return self.dense.architecture.by_position[group.matrix, layer]

    def device(self, group: WeightGroup) -> torch.device:
        module = self.compressed.get_submodule(self.matrix(group, group.layers[0]).module)
        return next(module.parameters()).device

    def _start(self, group: WeightGroup, gram: Tensor) -> None:
        """Rounds the basis of a group, on inputs with this Gram."""
        layers = [self._layer(group, layer) for layer in group.layers]
        basis = layers[0].basis.detach().double()
        scales = torch.ones(len(basis), dtype=basis.dtype, device=basis.device)
        if scales_are_free(layers[0]):
            # A row of the basis has a scale of its own for each group, a column of the coefficients has not: so all of
            # these get one size, and errors of the small ones are no longer those of the large ones.
            sizes = torch.cat([layer.weight.detach().double() for layer in layers]).square().mean(dim=0).sqrt()
            scales = torch.where(sizes > 0.0, sizes, scales)
        basis = basis * scales[:, None]
        before = reads(layers[0], basis)
        codes, grid = self._rounded(basis, before.gram_of_basis(gram), layers[0].dtype)
        after = reads(layers[0], grid.values(codes))
        self._bases[group] = _Basis(packed(codes, grid), after.weight, before.weight, scales)

    def quantise(self, group: WeightGroup, layer: int, grams: Grams) -> None:
        """Quantises the matrix of a group in one layer."""
        matrix = self.matrix(group, layer)
        gram = grams.of(matrix, self.device(group))
        if not bool(gram.isfinite().all()):
            raise CalibrationError(
                f"precision: the inputs of {matrix.module} hold NaN or infinite values on the calibration text. Load "
                "the model in another dtype (model.dtype=float32 or bfloat16), or set precision=none."
            )
        if factorised_layer(self.compressed, matrix.module) is None:
            weight = read_weight(self.compressed, matrix.module)
            codes, grid = self._rounded(weight.double(), gram, weight.dtype)
            self._count(weight, grid.values(codes), gram)
            store_dense(self.compressed, matrix.module, packed(codes, grid), self.settings.stored)
            self.dense_layers.append(matrix.module)
            return
        if group not in self._bases:
            shared = group.size > 1 and self.statistics is not None
            self._start(group, group_gram(self.statistics, group, gram.device) if shared else gram)
        self._factors(group, layer, gram)
        if layer == max(group.layers):
            del self._bases[group]

    def _factors(self, group: WeightGroup, layer: int, gram: Tensor) -> None:
        """The coefficients of a layer, refitted to the rounded basis and rounded."""
        found, old = self._bases[group], self._layer(group, layer)
        weight = old.weight.detach().double() / found.scales
        product = found.before @ weight.mT
        if self.settings.refit:
            inputs, ridge = InputPairs(gram), self.settings.ridge
            weight = refit_coefficients(found.rounded, weight.mT, product, inputs, beta=0.0, ridge=ridge).mT
        codes, grid = self._rounded(weight, found.rounded.mT @ gram @ found.rounded, old.dtype)
        self._count(product.mT, grid.values(codes) @ found.rounded.mT, gram)
        name = self.matrix(group, layer).module
        store_factors(self.compressed, name, found.stored, packed(codes, grid), self.settings.stored)

    def _layer(self, group: WeightGroup, layer: int) -> FactorisedLinear:
        found = factorised_layer(self.compressed, self.matrix(group, layer).module)
        assert found is not None
        return found

    def _rounded(self, weight: Tensor, gram: Tensor, dtype: torch.dtype) -> tuple[Tensor, Grid]:
        chosen = self.settings
        importance = gram.diagonal() if chosen.error_feedback else None
        grid = fit_grid(
            weight,
            bits=chosen.bits,
            group_size=chosen.group_size,
            symmetric=chosen.symmetric,
            dtype=dtype,
            importance=importance,
        )
        if not chosen.error_feedback:
            return grid.codes(weight), grid
        by_importance = chosen.order == "importance"
        codes = round_with_feedback(weight, grid, gram, damping=chosen.damping, by_importance=by_importance)
        return codes, grid

    def _count(self, weight: Tensor, values: Tensor, gram: Tensor) -> None:
        nothing = torch.zeros_like(values)
        self._losses.append((output_loss(weight, values, gram), output_loss(weight, nothing, gram)))

    def report(self) -> dict[str, Any]:
        error, outputs = (math.fsum(pair[i] for pair in self._losses) for i in (0, 1))
        return {
            "matrices": len(self._losses),
            "dense_matrices": len(self.dense_layers),
            "relative_error": math.sqrt(error / outputs) if outputs > 0.0 else 0.0,
        }
