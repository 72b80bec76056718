"""Truncation towards the dense layer's outputs on inputs that have drifted: AA-SVD's closed form.

X are the inputs that a layer gets in the compressed model, `X + D` those that it gets in the dense model. The product P
of least `||X P - (X + D) W||_F` is `W* = W + (X^T X)^-1 X^T D W`, and the loss of any other product is that of W* plus
`||X (P - W*)||_F^2`. So the best product of a rank is the truncation of W* in the metric of X, as in SVD-LLM.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.linalg.cholesky import cholesky_whitener
from bs_exp.linalg.decomposition import decompose, truncate
from bs_exp.linalg.least_squares import InputPairs
from bs_exp.types import LossUnit, Metric, SharedFactors, WeightGroup


def anchored_factors(
    group: WeightGroup, weight: Float[Tensor, "d_in columns"], inputs: InputPairs, rank: int, *, ridge: float
) -> SharedFactors:
    """The factors of this rank with least `||X B C - (X + D) W||_F`, in fp64. AA-SVD (2604.02119), its objective 4.

    `ridge` is added to the diagonal of `X^T X`, as a share of its entries, and holds the product near the dense weight
    where inputs are few. Without drift this is SVD-LLM's truncation on the compressed model's inputs. Raises
    DecompositionError if the moments or the weight cannot be factorised.
    """
    group = replace(group, correction=0)
    whitener, added = cholesky_whitener(inputs.gram, ridge=ridge)
    target = weight.double()
    if inputs.cross is not None:
        pull = torch.linalg.solve_triangular(whitener.mT, inputs.cross @ target, upper=False)
        target = target + torch.linalg.solve_triangular(whitener, pull, upper=True)
    metric = Metric(whitener=whitener, ridge=added, unit=LossUnit.METRIC_NORM)
    return truncate(decompose(group, target, metric), rank)
