"""ZS-SVD's correction of a truncated weight: what was cut off, projected onto the loss's gradient, and cut again."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from bs_exp.linalg.decomposition import decompose, truncate
from bs_exp.types import Metric, SharedFactors, WeightGroup


def corrected_factors(
    group: WeightGroup,
    residual: Float[Tensor, "d_in columns"],
    product: Float[Tensor, "d_in columns"],
    gradient: Float[Tensor, "d_in columns"],
    metric: Metric,
    rank: int,
) -> SharedFactors:
    """The truncation, in the metric, of `product + (<G, R> / <G, G>) G`, in fp64.

    R, the residual, is the dense weight minus all that stands in its place, and G the gradient of the loss there. The
    step changes the loss, to first order, as going back to the dense weight would: `<G, R>`. ZS-SVD (2602.02848), its
    correction. Where the gradient is zero nothing is added. Raises DecompositionError for what is not finite.
    """
    squared = gradient.square().sum()
    share = (gradient * residual).sum() / squared if float(squared) > 0.0 else squared
    return truncate(decompose(replace(group, correction=0), product + share * gradient, metric), rank)
