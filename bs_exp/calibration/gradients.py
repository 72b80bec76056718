"""One forward and backward pass over the calibration windows: squared loss gradients of outputs and of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from bs_exp.calibration.checkpointing import is_large, recomputed_blocks
from bs_exp.errors import CalibrationError
from bs_exp.models.architecture import trunks
from bs_exp.models.model_inputs import feeder
from bs_exp.progress import Progress
from bs_exp.types import CalibrationData, LoadedModel, Statistic, WeightMatrix


class Accumulator(Protocol):
    """What is kept of the gradients of one matrix."""

    reads_inputs: ClassVar[bool]

    def add(self, inputs: Tensor, gradients: Tensor, batch: torch.Size) -> None:
        """Takes a matrix's inputs in a batch of sequences x positions (empty if it does not read them), and the loss
        gradients at its outputs."""

    def tensors(self) -> dict[str, Tensor]:
        """What was found, by name."""


class OutputGramSum:
    """`gram`: `sum_t g_t g_t^T` with `g_t` the gradient of the summed token loss at the output."""

    reads_inputs: ClassVar[bool] = False

    def __init__(self, matrix: WeightMatrix) -> None:
        self._gram = torch.zeros(matrix.d_out, matrix.d_out, dtype=torch.float64)

    def add(self, inputs: Tensor, gradients: Tensor, batch: torch.Size) -> None:
        rows = gradients.reshape(-1, gradients.shape[-1]).float()
        self._gram += (rows.mT @ rows).double().cpu()

    def tensors(self) -> dict[str, Tensor]:
        return {"gram": self._gram}


class SquaredGradientRows:
    """`rows`: row sums of `(dLoss/dW)^2`, averaged over sequences; the loss is that of a sequence's tokens, summed.

    Of all gradients of weights, one sequence's of one matrix exists at a time.
    """

    reads_inputs: ClassVar[bool] = True

    def __init__(self, matrix: WeightMatrix) -> None:
        self._rows = torch.zeros(matrix.d_in, dtype=torch.float64)
        self._sequences = 0

    def add(self, inputs: Tensor, gradients: Tensor, batch: torch.Size) -> None:
        for x, g in zip(_by_sequence(inputs, batch), _by_sequence(gradients, batch), strict=True):
            self._rows += (x.mT @ g).square().sum(1).double().cpu()
        self._sequences += batch[0]

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self._rows / max(self._sequences, 1)}


ACCUMULATORS: Mapping[Statistic, type[OutputGramSum] | type[SquaredGradientRows]] = {
    Statistic.OUTPUT_GRAM: OutputGramSum,
    Statistic.WEIGHT_GRADIENT: SquaredGradientRows,
}


def gather_gradients(
    model: LoadedModel, data: CalibrationData, statistics: Set[Statistic], *, progress: Progress
) -> Mapping[Statistic, Mapping[str, Mapping[str, Tensor]]]:
    """Tensors by statistic (of `ACCUMULATORS`) and module, from gradients of the token loss.

    The loss is the model's own, on the text's own tokens (empirical Fisher). No parameter gets a gradient: backward
    runs through activations only. Products in fp32, accumulated in fp64 on the CPU. Hooks and `requires_grad` flags
    are as before afterwards, whatever happened. Large models compute their blocks twice instead of keeping all
    activations. Raises CalibrationError if gradients are not finite.
    """
    matrices = model.architecture.matrices
    sums = {m.module: {s: ACCUMULATORS[s](m) for s in sorted(statistics)} for m in matrices}
    modules = {m.module: model.module.get_submodule(m.module) for m in matrices}
    reader = feeder(model, data.windows.feeding)
    batches = data.batches
    with _activation_gradients(model.module), recomputed_blocks(model) if is_large(model) else nullcontext():
        for batch in progress.track(batches, label="gradients", total=len(batches)):
            examples = reader.examples(batch.to(model.device))
            with _hooks(modules, sums, examples.shapes):
                examples.loss(model.module(**examples.inputs).logits, reduction="sum").backward()
    found = {s: {name: sums[name][s].tensors() for name in modules} for s in sorted(statistics)}
    if broken := [name for by_module in found.values() for name, tensors in by_module.items() if not _finite(tensors)]:
        raise CalibrationError(
            f"The loss gradients at {broken[-1]} hold NaN or infinite values on the calibration text. Load the model "
            "in another dtype (model.dtype=float32 or bfloat16), or check its weights."
        )
    return found


@contextmanager
def _activation_gradients(module: Any) -> Iterator[None]:
    """Gradients for activations and for no parameter: the embeddings' output starts the graph."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    # An encoder and a decoder look tokens up apart, though in one table.
    embeddings: set[nn.Module] = {part.get_input_embeddings() for part in (module, *trunks(module))}
    handles = [e.register_forward_hook(lambda layer, arguments, output: output.requires_grad_()) for e in embeddings]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _hooks(
    modules: Mapping[str, nn.Module], sums: Mapping[str, Mapping[Statistic, Accumulator]], shapes: Sequence[torch.Size]
) -> Iterator[None]:
    """Hooks for one batch; `shapes` are those that its sequences x positions may have."""

    def watch(accumulators: Sequence[Accumulator]) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            # Backward through activations alone does not keep the inputs, so they are kept only for who reads them.
            reads = any(accumulator.reads_inputs for accumulator in accumulators)
            inputs = arguments[0].detach() if reads else output.new_empty(0)
            rows = output.numel() // output.shape[-1]
            batch = next((shape for shape in shapes if shape.numel() == rows), shapes[0])

            def accumulate(gradients: Tensor) -> None:
                for accumulator in accumulators:
                    accumulator.add(inputs, gradients, batch)

            output.register_hook(accumulate)

        return hook

    handles = [module.register_forward_hook(watch(tuple(sums[name].values()))) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_sequence(activations: Tensor, batch: torch.Size) -> Tensor:
    """Activations (sequences, positions, channels) in fp32. Some families fold the first two axes into one."""
    rows = activations.reshape(-1, activations.shape[-1]).float()
    # Tokens that were routed elsewhere are not here: the rest of the batch then counts as one sequence.
    return rows.unflatten(0, batch) if len(rows) == batch.numel() else rows[None]


def _finite(tensors: Mapping[str, Tensor]) -> bool:
    # What is infinite anywhere in a Gram is infinite on its diagonal.
    seen = [tensor.diagonal() if tensor.dim() == 2 else tensor for tensor in tensors.values()]
    return all(bool(tensor.isfinite().all()) for tensor in seen)
