"""Weights on both sides of the error: a Kronecker-factored Fisher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.checks import check_share
from bs_exp.decomposition import cholesky_whitener
from bs_exp.errors import ConfigError
from bs_exp.types import GroupStatistics, LossUnit, Metric, Statistic


@dataclass(frozen=True, kw_only=True)
class TwoSidedWhitening:
    """Error in the loss itself: `1/2 sum_i ||H^(1/2) dW_i G_i^(1/2)||_F^2` nats per predicted token, to second order.

    `H` is the group's input Gram per token, averaged over its layers; `G_i = E[g g^T]` with g the gradient of the token
    loss at the output of layer i's matrix. So losses of different groups, types and depths have one unit and may
    be compared. `ridge` and `damping` are added to H's and G's diagonals, in units of their means; `temper` is the
    exponent gamma of `G^gamma` (trace kept): below 1 the curvature is trusted less, for large steps.
    Kronecker factors: Martens and Grosse (1503.05671), section 3; for SVD: GFWSVD (2505.17974), LEMS/KFAC-SVD.
    """

    ridge: float
    damping: float
    temper: float

    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.GRAM, Statistic.OUTPUT_GRAM})

    def __post_init__(self) -> None:
        check_share(ridge=self.ridge, damping=self.damping)
        if not 0.0 <= self.temper <= 1.0:
            raise ConfigError(
                f"temper must be between 0 (outputs weighted alike) and 1 (full curvature), got {self.temper}."
            )

    def metric(self, statistics: GroupStatistics) -> Metric:
        if statistics.gram is None or statistics.output_grams is None:
            raise ValueError("TwoSidedWhitening needs Grams of inputs and outputs; it says so in `needs`.")
        per_token = statistics.gram / (statistics.tokens * statistics.group.size)
        whitener, ridge = cholesky_whitener(per_token, ridge=self.ridge)
        right, dampings = {}, []
        # Not every token that is read is predicted (masked tokens, a decoder's target).
        predictions = statistics.predictions or statistics.tokens
        for layer, total in statistics.output_grams.items():
            upper, damping = cholesky_whitener(tempered(total / predictions, self.temper), ridge=self.damping)
            right[layer] = upper.mT.contiguous()
            dampings.append(damping)
        return Metric(whitener=whitener, ridge=ridge, right=right, damping=max(dampings), unit=LossUnit.NATS)


def tempered(gram: Float[Tensor, "d d"], exponent: float) -> Float[Tensor, "d d"]:
    """`gram^exponent`, scaled to the trace of `gram`."""
    if exponent == 1.0:
        return gram
    values, vectors = torch.linalg.eigh(gram)
    powers = values.clamp_min(0.0).pow(exponent)
    powers = powers * (values.clamp_min(0.0).sum() / powers.sum())
    result: Tensor = (vectors * powers) @ vectors.mT
    return result
