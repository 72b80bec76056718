"""Weights on both sides of the error: a Kronecker-factored Fisher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.linalg.cholesky import damped_root
from bs_exp.linalg.decomposition import needs_left_root, needs_right_root
from bs_exp.types import GramRoot, GroupStatistics, LossUnit, Metric, Statistic
from bs_exp.validation import check_choice, check_share, check_unit

# Square root of the curvature (nats) assumed for outputs that do not reach the loss: negligible, but invertible.
_NEGLIGIBLE = 1e-6
_CURVATURES: Mapping[str, Statistic] = {
    "label": Statistic.OUTPUT_GRAM,
    "sampled": Statistic.SAMPLED_OUTPUT_GRAM,
    "top_k": Statistic.TOP_K_OUTPUT_GRAM,
}


@dataclass(frozen=True, kw_only=True)
class TwoSidedWhitening:
    """Error in the loss itself: `1/2 sum_i ||H^(1/2) dW_i G_i^(1/2)||_F^2` nats per predicted token, to second order.

    `H` is the group's input Gram per token, averaged over its layers; `G_i = E[g g^T]` with g the gradient of the token
    loss at the output of layer i's matrix. So losses of different groups, types and depths have one unit and may
    be compared. `ridge` and `damping` are added to H's and G's diagonals, as shares of their entries; `temper` is the
    exponent gamma of `G^gamma`, scaled to the trace of G: below 1 it trusts the curvature less, meant for large steps.
    A layer whose outputs have no influence on the loss is given a negligible G.

    `curvature` says of which labels that loss is. `label`: the text's own (empirical Fisher). `sampled`: drawn from the
    model's predictions, one per token, so that G estimates the curvature of the KL divergence. `top_k`: drawn among the
    five most probable tokens, whose probabilities are scaled to 1 (IO-SVD, 2605.15626; it sums over these tokens
    instead of drawing one).
    Kronecker factors: Martens and Grosse (1503.05671), section 3; for SVD: GFWSVD (2505.17974), LEMS/KFAC-SVD.
    """

    ridge: float
    damping: float
    temper: float
    curvature: str = "label"

    def __post_init__(self) -> None:
        check_share(ridge=self.ridge, damping=self.damping)
        check_unit(" (outputs weighted alike, full curvature)", temper=self.temper)
        check_choice("curvature", self.curvature, tuple(_CURVATURES))

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Statistic.GRAM, _CURVATURES[self.curvature]})

    def metric(self, statistics: GroupStatistics) -> Metric:
        output_grams = {
            "label": statistics.output_grams,
            "sampled": statistics.sampled_grams,
            "top_k": statistics.top_k_grams,
        }[self.curvature]
        if statistics.gram is None or output_grams is None:
            raise ValueError("TwoSidedWhitening needs Grams of inputs and outputs; it says so in `needs`.")
        group = statistics.group
        per_token = statistics.gram / (statistics.tokens * group.size)
        whitener, ridge = damped_root(per_token, ridge=self.ridge, needed=needs_left_root(group))
        right: dict[int, Tensor | GramRoot] = {}
        dampings = []
        # The loss may be over fewer tokens than are read (masked tokens, a decoder's target).
        predictions = statistics.predictions or statistics.tokens
        for layer, total in output_grams.items():
            if not bool(total.any()):
                # No output of this matrix reaches the loss (it is multiplied by zeros later): any error costs nothing.
                right[layer] = _NEGLIGIBLE * torch.eye(len(total), dtype=torch.float64, device=total.device)
                continue
            root, added = damped_root(
                tempered(total / predictions, self.temper),
                ridge=self.damping,
                needed=needs_right_root(group),
                of="output gradients",
            )
            right[layer] = root.mT.contiguous() if isinstance(root, Tensor) else root
            dampings.append(float(added.mean()))
        damping = max(dampings, default=0.0)
        return Metric(whitener=whitener, ridge=ridge, right=right, damping=damping, unit=LossUnit.NATS)


def tempered(gram: Float[Tensor, "d d"], exponent: float) -> Float[Tensor, "d d"]:
    """`gram^exponent`, scaled to the trace of `gram`."""
    if exponent == 1.0:
        return gram
    values, vectors = torch.linalg.eigh(gram)
    powers = values.clamp_min(0.0).pow(exponent)
    powers = powers * (values.clamp_min(0.0).sum() / powers.sum())
    result: Tensor = (vectors * powers) @ vectors.mT
    return result
