"""Statistics of loss gradients: at the outputs of matrices, and of their weights."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from bs_exp.calibration.statistics import Loss, Place, Seen, Subject, summed
from bs_exp.processes import add_up, total_of


class OutputGramSum:
    """`gram`: `sum_t g_t g_t^T` with `g_t` the gradient of the summed token loss at the output of a matrix."""

    place: ClassVar[Place] = Place.OUTPUT_GRADIENT
    loss: ClassVar[Loss | None] = "sum"
    reads_inputs: ClassVar[bool] = False

    def __init__(self, subject: Subject, *, batches: int) -> None:
        channels = subject.matrices[0].d_out
        self._gram = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, seen: Seen) -> None:
        rows = seen.rows
        self._gram = summed(self._gram, rows.mT @ rows)

    def combine(self) -> None:
        self._gram = add_up(self._gram.cpu())

    def tensors(self) -> dict[str, Tensor]:
        return {"gram": self._gram}


class SampledOutputGramSum(OutputGramSum):
    """`gram`: `sum_t g_t g_t^T`, the loss being that of labels that are drawn from the model's own predictions."""

    loss: ClassVar[Loss | None] = "sampled"


class TopKOutputGramSum(OutputGramSum):
    """`gram`: `sum_t g_t g_t^T`, the loss being that of labels that are drawn among the most probable tokens."""

    loss: ClassVar[Loss | None] = "top_k"


class ProbedOutputGramSum(OutputGramSum):
    """`gram`: `sum_t g_t g_t^T`, of random sums of the model's outputs; averaged over the probes of a window."""

    loss: ClassVar[Loss | None] = "probes"


class SquaredGradientRows:
    """`rows`: row sums of `(dLoss/dW)^2`, averaged over sequences; the loss is that of a sequence's tokens, summed.

    Of all gradients of weights, one sequence's of one matrix exists at a time.
    """

    place: ClassVar[Place] = Place.OUTPUT_GRADIENT
    loss: ClassVar[Loss | None] = "sum"
    reads_inputs: ClassVar[bool] = True

    def __init__(self, subject: Subject, *, batches: int) -> None:
        self._rows = torch.zeros(subject.matrices[0].d_in, dtype=torch.float64)
        self._sequences = 0

    def add(self, seen: Seen) -> None:
        assert seen.inputs is not None and seen.batch is not None
        inputs, gradients = _by_sequence(seen.inputs, seen.batch), _by_sequence(seen.values, seen.batch)
        for x, g in zip(inputs, gradients, strict=True):
            self._rows = summed(self._rows, (x.mT @ g).square().sum(1))
        self._sequences += seen.batch[0]

    def combine(self) -> None:
        self._rows, self._sequences = add_up(self._rows.cpu()), total_of(self._sequences)

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self._rows / max(self._sequences, 1)}


class LossGradient:
    """`gradient`: `sum_t x_t g_t^T`, the gradient of the summed token loss by a matrix `[d_in, d_out]`, in fp32.

    It takes as much memory as the weights in fp64, until the layer is finished.
    """

    place: ClassVar[Place] = Place.OUTPUT_GRADIENT
    loss: ClassVar[Loss | None] = "sum"
    reads_inputs: ClassVar[bool] = True

    def __init__(self, subject: Subject, *, batches: int) -> None:
        [matrix] = subject.matrices
        self._gradient = torch.zeros(matrix.d_in, matrix.d_out, dtype=torch.float64)

    def add(self, seen: Seen) -> None:
        assert seen.inputs is not None
        inputs = seen.inputs.reshape(-1, seen.inputs.shape[-1]).float()
        self._gradient = summed(self._gradient, inputs.mT @ seen.rows)

    def combine(self) -> None:
        self._gradient = add_up(self._gradient.cpu())

    def tensors(self) -> dict[str, Tensor]:
        return {"gradient": self._gradient.float()}


class Sensitivity:
    """`value`: `sum ||dLoss/dW||_F / ||W||_F` over a block's targeted matrices; the loss is a batch's mean token loss.

    Averaged over batches, as the official code does, so it depends on their size: the noise of a batch's gradient is
    part of its norm. A gradient is dropped as soon as it is measured, so that one matrix's exists at a time. DipSVD
    (2506.20353).
    """

    place: ClassVar[Place] = Place.WEIGHT_GRADIENT
    loss: ClassVar[Loss | None] = "mean"
    reads_inputs: ClassVar[bool] = False

    def __init__(self, subject: Subject, *, batches: int) -> None:
        self._batches = batches
        self._sum = 0.0

    def add(self, seen: Seen) -> None:
        assert seen.weight is not None
        size = float(seen.weight.detach().float().norm())
        # A matrix of zeros has no relative change; the official code's 1e-8 keeps it finite.
        self._sum += float(seen.values.float().norm()) / (size + 1e-8) / self._batches

    def combine(self) -> None:
        self._sum = total_of(self._sum)

    def tensors(self) -> dict[str, Tensor]:
        return {"value": torch.tensor(self._sum, dtype=torch.float64)}


def _by_sequence(activations: Tensor, batch: torch.Size) -> Tensor:
    """Activations (sequences, positions, channels) in fp32. Some families fold the first two axes into one."""
    rows = activations.reshape(-1, activations.shape[-1]).float()
    # Tokens that were routed elsewhere are not here: the rest of the batch then counts as one sequence.
    return rows.unflatten(0, batch) if len(rows) == batch.numel() else rows[None]
