"""The table of statistics, and one pass over the windows that gathers several of them at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bs_exp import processes
from bs_exp.calibration.activations import BlockOutputSpectrum, GramSum, MomentSums
from bs_exp.calibration.gradients import (
    LossGradient,
    OutputGramSum,
    ProbedOutputGramSum,
    SampledOutputGramSum,
    Sensitivity,
    SquaredGradientRows,
    TopKOutputGramSum,
)
from bs_exp.calibration.statistics import Accumulator, Loss, Place, Seen, Subject, is_finite, subjects
from bs_exp.calibration.walk import is_large, walk
from bs_exp.errors import CalibrationError
from bs_exp.models.architecture import module_of
from bs_exp.models.blocks import states_of
from bs_exp.models.hooks import Hooks
from bs_exp.progress import Progress
from bs_exp.types import Architecture, CalibrationData, LoadedModel, Statistic, Task, WeightMatrix

# Everything that can be gathered. A new statistic is a class that keeps the protocol, and a row.
ACCUMULATORS: Mapping[Statistic, type[Accumulator]] = {
    Statistic.GRAM: GramSum,
    Statistic.INPUT_MOMENTS: MomentSums,
    Statistic.BLOCK_OUTPUTS: BlockOutputSpectrum,
    Statistic.OUTPUT_GRAM: OutputGramSum,
    Statistic.SAMPLED_OUTPUT_GRAM: SampledOutputGramSum,
    Statistic.TOP_K_OUTPUT_GRAM: TopKOutputGramSum,
    Statistic.PROBED_OUTPUT_GRAM: ProbedOutputGramSum,
    Statistic.WEIGHT_GRADIENT: SquaredGradientRows,
    Statistic.LOSS_GRADIENT: LossGradient,
    Statistic.SENSITIVITY: Sensitivity,
}
_LOSSES: Sequence[Loss | None] = (None, "sum", "mean", "sampled", "top_k", "probes")

# Numbers that may come along with the statistics of a loss: 0.5 GB in fp64.
_ALONG = 2**26

Gathered: TypeAlias = tuple[Statistic, str, dict[str, Tensor]]
"""A statistic, the name of its subject, and the tensors found."""


def gather(
    model: LoadedModel,
    data: CalibrationData,
    statistics: Set[Statistic],
    *,
    progress: Progress,
    folder: Path | None = None,
    layers: Collection[int] | None = None,
    key: str | None = None,
) -> Iterator[Gathered]:
    """The statistics of all their subjects on the calibration windows, as soon as each has seen all of them.

    Each pass over the windows gathers all that are made of the gradients of one loss: the model's own, on the text's
    own tokens (empirical Fisher) or on drawn ones, or random sums of outputs. What needs no loss comes along, or has a
    pass without logits (`passes`). `layers` are those whose statistics are wanted (None: all); hidden states that wait
    on disk do so in `folder`, from where a walk that was interrupted takes them up by their `key`. Tensors are on the
    CPU. Several processes share out the batches, and each yields the statistics of all. Hooks, `requires_grad` flags
    and gradients are as before afterwards, whatever happened.
    Raises CalibrationError if what was seen is not finite, or matrices of one site read different inputs.
    """
    count, part = len(data.batches), data
    if processes.count() > 1:
        part = replace(data, windows=replace(data.windows, ids=torch.cat(processes.mine(data.batches))))
        key = key and f"{key}-{processes.rank()}-of-{processes.count()}"
    for loss, chosen in passes(model, statistics):
        sums = _Sums(model, chosen, loss, batches=count)
        for done in walk(model, part, sums, progress=progress, folder=folder, layers=layers, key=key):
            yield from sums.finished(done)


def passes(model: LoadedModel, statistics: Set[Statistic]) -> Iterator[tuple[Loss | None, list[Statistic]]]:
    """The passes over the windows that gather these statistics: the loss of each, and what it gathers.

    What needs no loss comes along with the first loss, if it takes little memory beside the statistics of that, the
    model is not large (blocks that are computed again would be watched twice), and reads there what it reads without a
    loss: a masked language model does so for probes alone. Tensors are those of a pass without a loss, bit for bit; of
    a compressed model up to the order in which few tokens are summed (`modeling_basis_sharing.linear`).
    """
    by_loss = {loss: chosen for loss in _LOSSES if (chosen := [s for s in sorted(statistics) if _loss(s) == loss])}
    if None in by_loss and not is_large(model) and _numbers(model.architecture, by_loss[None]) <= _ALONG:
        reads_alike = [loss for loss in by_loss if loss == "probes" or (loss and model.task is not Task.MASKED_LM)]
        if reads_alike:
            by_loss[reads_alike[0]] += by_loss.pop(None)
    yield from by_loss.items()


def _loss(statistic: Statistic) -> Loss | None:
    return ACCUMULATORS[statistic].loss


def _numbers(architecture: Architecture, statistics: Sequence[Statistic]) -> int:
    """At most so many numbers these statistics of activations hold: none takes more than Grams of all inputs."""
    return len(statistics) * sum(site.matrices[0].d_in ** 2 for site in subjects(architecture, Place.INPUT))


class _Sums:
    """The accumulators of one pass, by statistic and subject; each is made when its layer is first attached."""

    def __init__(self, model: LoadedModel, statistics: Sequence[Statistic], loss: Loss | None, *, batches: int) -> None:
        self._model = model
        self._loss = loss
        self._batches = batches
        chosen: dict[Place, list[Statistic]] = {}
        for statistic in statistics:
            chosen.setdefault(ACCUMULATORS[statistic].place, []).append(statistic)
        self._watched = [(place, s, chosen[place]) for place in chosen for s in subjects(model.architecture, place)]
        self._sums: dict[tuple[Statistic, str], Accumulator] = {}
        self._compared: set[str] = set()
        self._shapes: Sequence[torch.Size] = ()

    @property
    def loss(self) -> Loss | None:
        """That whose gradients are watched, if any are."""
        return self._loss

    @property
    def weights(self) -> Collection[Tensor]:
        """Those whose gradients are watched."""
        matrices = [m for place, s, _ in self._watched if place is Place.WEIGHT_GRADIENT for m in s.matrices]
        return [module_of(self._model.module, matrix).weight for matrix in matrices]

    def next_batch(self, shapes: Sequence[torch.Size]) -> None:
        """Notes the windows and positions that the batch may consist of."""
        self._shapes = shapes

    def attach(self, hooks: Hooks, layers: Sequence[int]) -> None:
        """Attaches the accumulators of these layers."""
        for place, subject, statistics in self._watched:
            if subject.layer not in layers:
                continue
            for key in [(statistic, subject.name) for statistic in statistics]:
                if key not in self._sums:
                    self._sums[key] = ACCUMULATORS[key[0]](subject, batches=self._batches)
            sums = [self._sums[statistic, subject.name] for statistic in statistics]
            match place:
                case Place.INPUT:
                    self._watch_inputs(hooks, subject, sums)
                case Place.OUTPUT_GRADIENT:
                    self._watch_output_gradient(hooks, subject, sums)
                case Place.WEIGHT_GRADIENT:
                    for matrix in subject.matrices:
                        _watch_weight_gradient(hooks, module_of(self._model.module, matrix).weight, sums)
                case Place.BLOCK_OUTPUT:
                    path = self._model.architecture.blocks[subject.layer]
                    _watch_block_output(hooks, self._model.module.get_submodule(path), sums)

    def finished(self, layers: Sequence[int]) -> Iterator[Gathered]:
        """What was found in these layers, which is not kept here. CalibrationError if anything is not finite."""
        found: list[Gathered] = []
        broken: dict[Place, list[str]] = {}
        for place, subject, statistics in self._watched:
            if subject.layer in layers:
                new = []
                for statistic in statistics:
                    accumulator = self._sums.pop((statistic, subject.name))
                    accumulator.combine()
                    new.append((statistic, subject.name, accumulator.tensors()))
                if not all(is_finite(tensors) for _, _, tensors in new):
                    broken.setdefault(place, []).append(_not_finite(place, subject))
                found += new
        # Forward, what is not finite spreads to the blocks behind, and to all gradients; these, to the blocks in front.
        for place in (Place.INPUT, Place.BLOCK_OUTPUT, Place.OUTPUT_GRADIENT, Place.WEIGHT_GRADIENT):
            if told := broken.get(place):
                raise CalibrationError(told[-1 if place is Place.OUTPUT_GRADIENT else 0])
        yield from found

    def _watch_inputs(self, hooks: Hooks, subject: Subject, sums: Sequence[Accumulator]) -> None:
        """Accumulates the inputs of a site's first matrix, and compares those of its others with them once.

        "First" is the order of `roles.yaml`: a block may run the others before it.
        """
        first, *others = subject.matrices
        latest: list[Tensor] = []
        early: list[tuple[WeightMatrix, Tensor]] = []

        def accumulate(inputs: Tensor) -> None:
            inputs = inputs.detach()  # a pass with a loss has a graph
            for matrix, read in early:
                require_same(matrix, read, inputs)
            early.clear()
            latest[:] = [inputs] if any(other.module not in self._compared for other in others) else []
            for accumulator in sums:
                accumulator.add(Seen(inputs))

        def compare(matrix: WeightMatrix, inputs: Tensor) -> None:
            if matrix.module in self._compared:
                return
            self._compared.add(matrix.module)
            if latest:
                require_same(matrix, inputs.detach(), latest[0])
            else:
                early.append((matrix, inputs.detach()))

        def require_same(matrix: WeightMatrix, inputs: Tensor, wanted: Tensor) -> None:
            # NaN equals NaN here: it is reported for what it is, once all inputs were seen.
            same = inputs.shape == wanted.shape and torch.allclose(inputs, wanted, rtol=0.0, atol=0.0, equal_nan=True)
            if not same:
                raise CalibrationError(
                    f"{matrix.module} does not read the same input as the other matrices of site {subject.name}. "
                    "Map it to a role with another input site in model.roles."
                )

        hooks.on_input(self._model.module.get_submodule(first.module), accumulate)
        for other in others:
            hooks.on_input(self._model.module.get_submodule(other.module), partial(compare, other))

    def _watch_output_gradient(self, hooks: Hooks, subject: Subject, sums: Sequence[Accumulator]) -> None:
        def accumulate(inputs: Tensor | None, gradient: Tensor) -> None:
            rows = gradient.numel() // gradient.shape[-1]
            batch = next((shape for shape in self._shapes if shape.numel() == rows), self._shapes[0])
            for accumulator in sums:
                accumulator.add(Seen(gradient, inputs=inputs, batch=batch))

        # Backward through activations alone does not keep the inputs, so they are kept only for who reads them.
        reads = any(accumulator.reads_inputs for accumulator in sums)
        hooks.on_output_gradient(self._model.module.get_submodule(subject.name), accumulate, keep_inputs=reads)


def _watch_weight_gradient(hooks: Hooks, weight: Tensor, sums: Sequence[Accumulator]) -> None:
    def accumulate(gradient: Tensor) -> None:
        for accumulator in sums:
            accumulator.add(Seen(gradient, weight=weight))

    hooks.on_weight_gradient(weight, accumulate)


def _watch_block_output(hooks: Hooks, block: nn.Module, sums: Sequence[Accumulator]) -> None:
    def accumulate(arguments: tuple[Any, ...], keywords: Mapping[str, Any], output: Any) -> None:
        for accumulator in sums:
            accumulator.add(Seen(states_of(output).detach()))

    hooks.on_call(block, accumulate)


def _not_finite(place: Place, subject: Subject) -> str:
    """What an error says of a subject."""
    so, behind = "hold NaN or infinite values on the calibration text", ""
    match place:
        case Place.INPUT:
            what = f"inputs of {', '.join(m.module for m in subject.matrices)}"
            behind = ", so everything behind them is lost too"
        case Place.OUTPUT_GRADIENT:
            what = f"loss gradients at {subject.name}"
        case Place.WEIGHT_GRADIENT:
            what = f"loss gradients of layer {subject.layer}"
        case Place.BLOCK_OUTPUT:
            what = f"outputs of layer {subject.layer}"
    return (
        f"The {what} {so}{behind}. Load the model in another dtype (model.dtype=float32 or bfloat16), or check its "
        "weights."
    )
