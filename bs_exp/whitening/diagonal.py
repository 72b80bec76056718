"""Scaling of every input channel by the size of its activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bs_exp.types import GroupStatistics, Metric, Statistic
from bs_exp.validation import check_choice, check_number

SIZES = ("mean", "max")


@dataclass(frozen=True, kw_only=True)
class DiagonalWhitening:
    """Error in weights scaled by channel, `||D (W - W_k)||_F` with `D = diag(size(|x|)^alpha + epsilon)`.

    `size` is the mean or the maximum of |x| over the calibration tokens (and the layers of a group); alpha = 0 is plain
    SVD. The predicted loss is that of the scaled weights, not of the outputs. The official code sums the means over
    samples instead of averaging them, which only makes its epsilon smaller.
    ASVD (2312.05821), section 3.2; defaults of its official code.
    """

    alpha: float
    size: str
    epsilon: float

    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.INPUT_MOMENTS})

    def __post_init__(self) -> None:
        check_number(0.0, alpha=self.alpha)
        check_choice("size", self.size, SIZES)
        # Without epsilon, a channel that is always zero would make the scaling singular.
        check_number(1e-12, epsilon=self.epsilon)

    def metric(self, statistics: GroupStatistics) -> Metric:
        if statistics.moments is None:
            raise ValueError("DiagonalWhitening needs input moments; it says so in `needs`.")
        sizes = statistics.moments.absolute if self.size == "mean" else statistics.moments.peak
        return Metric(whitener=torch.diag(sizes.pow(self.alpha) + self.epsilon))
