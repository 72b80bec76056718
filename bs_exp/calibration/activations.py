"""Statistics of activations: what input sites read, and what blocks give."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from bs_exp.calibration.statistics import Loss, Place, Seen, Subject, is_finite, summed
from bs_exp.processes import add_up, largest, total_of


class GramSum:
    """`gram`: `X^T X` of the inputs X of a site, summed over all tokens; `tokens`: their number.

    On a CPU the products are in fp64: rounded to fp32, the Gram of a few tokens or of constant inputs has eigenvalues
    of its rounding in place of zeros, and predicted losses are off by 5e-4 of `||X W||`. On accelerators products are
    in fp32 (and so are they off, where Grams are singular), sums in fp64. BLAS's product for symmetric
    results (`dsyrk`) is half the work, but its threads and PyTorch's wait for each other (docs/LOG.md).
    """

    place: ClassVar[Place] = Place.INPUT
    loss: ClassVar[Loss | None] = None
    reads_inputs: ClassVar[bool] = False

    def __init__(self, subject: Subject, *, batches: int) -> None:
        channels = subject.matrices[0].d_in
        self._gram = torch.zeros(channels, channels, dtype=torch.float64)
        self._tokens = 0

    def add(self, seen: Seen) -> None:
        rows = seen.exact_rows
        self._gram = summed(self._gram, rows.mT @ rows)
        self._tokens += len(rows)

    def combine(self) -> None:
        self._gram, self._tokens = add_up(self._gram.cpu()), total_of(self._tokens)

    def tensors(self) -> dict[str, Tensor]:
        upper = self._gram.triu()
        return {"gram": upper + upper.triu(1).mT, "tokens": torch.tensor(self._tokens)}


class MomentSums:
    """By input channel: `absolute`, the mean of |x|; `peak`, its maximum; `fourth`, the mean of x^4."""

    place: ClassVar[Place] = Place.INPUT
    loss: ClassVar[Loss | None] = None
    reads_inputs: ClassVar[bool] = False

    def __init__(self, subject: Subject, *, batches: int) -> None:
        self._tokens = 0
        self._absolute, self._peak, self._fourth = torch.zeros(3, subject.matrices[0].d_in, dtype=torch.float64)

    def add(self, seen: Seen) -> None:
        sizes = seen.rows.abs()
        self._tokens += len(sizes)
        self._absolute += sizes.sum(0).double().cpu()
        self._peak = torch.maximum(self._peak, sizes.amax(0).double().cpu())
        self._fourth += sizes.square().square().sum(0).double().cpu()

    def combine(self) -> None:
        self._tokens = total_of(self._tokens)
        self._absolute, self._fourth = add_up(self._absolute), add_up(self._fourth)
        self._peak = largest(self._peak)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "absolute": self._absolute / max(self._tokens, 1),
            "peak": self._peak,
            "fourth": self._fourth / max(self._tokens, 1),
        }


class BlockOutputSpectrum:
    """`values`: singular values, falling, of a block's outputs (all tokens x channels), from their Gram in fp64.

    fp64 in the products too: a sum of singular values depends on the small ones, and squares in fp32 lose them beside
    the few large channels that language models have. NaN if an output is not finite; empty for a block that never ran.
    """

    place: ClassVar[Place] = Place.BLOCK_OUTPUT
    loss: ClassVar[Loss | None] = None
    reads_inputs: ClassVar[bool] = False

    def __init__(self, subject: Subject, *, batches: int) -> None:
        self._gram = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, seen: Seen) -> None:
        rows = seen.values.reshape(-1, seen.values.shape[-1]).double()
        gram = (rows.mT @ rows).cpu()
        self._gram = self._gram + gram if len(self._gram) else gram

    def combine(self) -> None:
        self._gram = add_up(self._gram)

    def tensors(self) -> dict[str, Tensor]:
        if not is_finite({"gram": self._gram}):
            return {"values": torch.full((len(self._gram),), torch.nan, dtype=torch.float64)}
        return {"values": torch.linalg.eigvalsh(self._gram).clamp_min(0.0).sqrt().flip(0)}
