"""Grams of what the matrices read, while the model is quantised: of one block after the other, or of all at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bs_exp.calibration.group_statistics import CalibrationStats, calibrate
from bs_exp.calibration.rare_experts import lacking, mean_gram
from bs_exp.errors import CalibrationError
from bs_exp.models.block_stream import BlockStream, Waiting
from bs_exp.models.blocks import Blocks
from bs_exp.models.fingerprint import as_loaded
from bs_exp.models.hooks import Hooks
from bs_exp.models.model_inputs import feeder
from bs_exp.types import CalibrationData, LoadedModel, Statistic, WeightGroup, WeightMatrix
from bs_exp.workspace import Workspace


class Grams(Protocol):
    """Second moments of the inputs of matrices, in fp64."""

    def blocks(self) -> Iterator[int]:
        """The layers, in the order in which their matrices are to be quantised; the Grams of a layer are known then."""

    def of(self, matrix: WeightMatrix, device: torch.device) -> Float[Tensor, "d_in d_in"]:
        """The Gram of the inputs of a matrix in the layer at hand."""


class StreamedGrams:
    """Grams of each block on the inputs that it gets from the blocks before it, as they were quantised."""

    def __init__(
        self, compressed: PreTrainedModel, dense: LoadedModel, data: CalibrationData, workspace: Workspace
    ) -> None:
        self._model = replace(dense, module=compressed)
        self._workspace = workspace
        feed = feeder(dense, data.windows.feeding)
        inputs = (feed.inputs(ids.to(dense.device)) for ids in data.batches)
        self._stream = BlockStream(Blocks(self._model), inputs, Waiting(data.activations, workspace.cache.folder))
        self._found: dict[str, Tensor] = {}
        self._tokens: Counter[str] = Counter()

    def blocks(self) -> Iterator[int]:
        layers = range(len(self._model.architecture.blocks))
        for layer in self._workspace.progress.track(layers, label="quantising", total=len(layers)):
            self._gather(layer)
            yield layer
            self._found.clear()
            self._tokens.clear()
            for batch in range(len(self._stream)):
                self._stream.advance(batch, self._stream.run(layer, batch))

    def of(self, matrix: WeightMatrix, device: torch.device) -> Tensor:
        if missing := lacking(matrix, self._tokens[matrix.input_site]):
            sites = [m.input_site for m in self._model.architecture.experts_of(matrix.matrix, matrix.layer)]
            mean = mean_gram(((self._found[site], self._tokens[site]) for site in sites if site in self._found), matrix)
            return (self._found.get(matrix.input_site, 0.0) + missing * mean).to(device)
        if matrix.input_site not in self._found:
            raise CalibrationError(
                f"precision: {matrix.module} did not run on the calibration text, so nothing is known of its inputs. "
                "Set precision.inputs=one_shot."
            )
        return self._found[matrix.input_site].to(device)

    def _gather(self, layer: int) -> None:
        architecture = self._model.architecture
        sites = {m.input_site: m.module for m in architecture.matrices if m.layer == layer}
        with Hooks() as hooks:
            for site, name in sites.items():
                hooks.on_input(self._model.module.get_submodule(name), partial(self._add, site))
            for batch in range(len(self._stream)):
                self._stream.run(layer, batch)

    def _add(self, site: str, inputs: Tensor) -> None:
        rows = inputs.detach().flatten(0, -2)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        gram = (rows.mT @ rows).double()
        self._tokens[site] += len(rows)
        self._found[site] = self._found[site] + gram if site in self._found else gram


class PassGrams:
    """Grams of all layers from one pass of the compressed model, before any of it is quantised."""

    def __init__(
        self, compressed: PreTrainedModel, dense: LoadedModel, data: CalibrationData, workspace: Workspace
    ) -> None:
        self._layers = len(dense.architecture.blocks)
        self._workspace = workspace
        self._stats = pass_statistics(compressed, dense, data, workspace)

    def blocks(self) -> Iterator[int]:
        layers = range(self._layers)
        yield from self._workspace.progress.track(layers, label="quantising", total=self._layers)

    def of(self, matrix: WeightMatrix, device: torch.device) -> Tensor:
        return group_gram(self._stats, WeightGroup(matrix.matrix, (matrix.place,), matrix.d_in, matrix.d_out), device)


def pass_statistics(
    compressed: PreTrainedModel, dense: LoadedModel, data: CalibrationData, workspace: Workspace
) -> CalibrationStats:
    """Grams of the inputs of all matrices of the compressed model, by one pass."""
    return calibrate(as_loaded(compressed, dense), data, needs={Statistic.GRAM}, workspace=workspace)


def group_gram(stats: CalibrationStats | None, group: WeightGroup, device: torch.device) -> Tensor:
    """The Gram of the inputs of all layers of a group."""
    assert stats is not None
    gram = stats.of(group, device).gram
    assert gram is not None
    return gram


class NoGrams:
    """Nothing is known of inputs: where rounding is to the nearest, and no text is read."""

    def __init__(self, dense: LoadedModel) -> None:
        self._architecture = dense.architecture

    def blocks(self) -> Iterator[int]:
        yield from range(len(self._architecture.blocks))

    def of(self, matrix: WeightMatrix, device: torch.device) -> Tensor:
        return torch.eye(matrix.d_in, dtype=torch.float64, device=device)


def by_layer(groups: Mapping[WeightGroup, object]) -> dict[int, list[WeightGroup]]:
    """The groups that have a matrix in a layer, by layer."""
    found: dict[int, list[WeightGroup]] = {}
    for group in groups:
        for layer in group.blocks:
            found.setdefault(layer, []).append(group)
    return found
