"""Scaling of every input channel by the loss gradients of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bs_exp.errors import DecompositionError
from bs_exp.types import GroupStatistics, Metric, Statistic
from bs_exp.validation import check_share


@dataclass(frozen=True, kw_only=True)
class FisherRowsWhitening:
    """Error in weights scaled by row, `||D (W - W_k)||_F` with `D_ii^2 = sum_j E[(dLoss/dW_ij)^2]`.

    The expectation is over calibration sequences (the paper's data items); a group's D^2 is summed over its layers.
    `ridge` is added to `D^2`, in units of its mean: rows without gradient (a channel that is always zero) would make D
    singular. The predicted loss is that of the scaled weights, not of the outputs.
    FWSVD (2207.00112), section 3.
    """

    ridge: float

    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.WEIGHT_GRADIENT})

    def __post_init__(self) -> None:
        check_share(above=0.0, ridge=self.ridge)

    def metric(self, statistics: GroupStatistics) -> Metric:
        if statistics.weight_gradient is None:
            raise ValueError("FisherRowsWhitening needs weight gradients; it says so in `needs`.")
        rows = statistics.weight_gradient.rows
        ridge = self.ridge * float(rows.mean())
        if ridge <= 0.0:
            raise DecompositionError(
                "the loss gradients of these weights are zero on all calibration sequences, so no row counts. "
                "Calibrate on other text, or use whitening=identity."
            )
        return Metric(whitener=torch.diag((rows + ridge).sqrt()), ridge=ridge)
