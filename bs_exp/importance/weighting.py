"""Shared by the importance strategies: norms of channels, their top share, and how weights act on a Gram."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.types import GroupStatistics
from bs_exp.validation import check_choice, check_number, check_share

# The official code amplifies by 30 on one side. Where channels are uncorrelated, the two-sided form with the square
# root of that is the same metric; the paper's own value is not known.
FACTORS: Mapping[str, float] = {"one_sided": 30.0, "two_sided": math.sqrt(30.0)}


def factor_of(form: str, factor: float | None) -> float:
    """The factor, or the default one of the form if it is None."""
    return FACTORS[form] if factor is None else float(factor)


def check_weighting(*, form: str, p: float, **factors: float | None) -> None:
    """ConfigError unless the form exists, p is in [0, 1), and every factor is None or at least 1."""
    check_choice("form", form, tuple(FACTORS))
    check_share(p=p)
    check_number(1.0, **factors)


def gram_of(statistics: GroupStatistics) -> Float[Tensor, "d d"]:
    """The group's Gram; ValueError if calibration did not gather it."""
    if statistics.gram is None:
        raise ValueError("Importance needs a Gram; it says so in `needs`.")
    return statistics.gram


def column_norms(gram: Float[Tensor, "d d"]) -> Float[Tensor, " d"]:
    """`alpha_j = sqrt(x_j^T (X X^T) x_j) = ||G[:, j]||`, with x_j the column j of the inputs X (DipSVD)."""
    norms: Tensor = gram.norm(dim=0)
    return norms


def top_count(p: float, channels: int) -> int:
    """Number of channels in the top share p: rounded down as in the official code, but at least 1 unless p is 0."""
    # 0.29 * 100 is 28.999... in binary floating point.
    return max(1, math.floor(round(p * channels, 9))) if p > 0.0 else 0


def top_weights(norms: Float[Tensor, " d"], p: float, factor: float) -> Float[Tensor, " d"]:
    """`factor` for the top share p of the channels, 1 for the others."""
    weights = torch.ones_like(norms)
    # Stable: of equal channels the first ones are taken, on every device.
    weights[norms.argsort(descending=True, stable=True)[: top_count(p, len(norms))]] = factor
    return weights


def weighted(statistics: GroupStatistics, weights: Float[Tensor, " d"], form: str) -> GroupStatistics:
    """The statistics with the Gram re-weighted by `D = diag(weights)` in the given form, `two_sided` or `one_sided`."""
    if bool((weights == 1.0).all()):
        return statistics
    make = two_sided if form == "two_sided" else one_sided
    return replace(statistics, gram=make(gram_of(statistics), weights))


def two_sided(gram: Float[Tensor, "d d"], weights: Float[Tensor, " d"]) -> Float[Tensor, "d d"]:
    """`D G D`: the Gram of inputs whose channels are scaled, `X D` (DipSVD, the paper)."""
    return weights[:, None] * gram * weights


def one_sided(gram: Float[Tensor, "d d"], weights: Float[Tensor, " d"]) -> Float[Tensor, "d d"]:
    """`(G D^2 G)^(1/2)`, which is `U Sigma U^T` for the SVD `G D = U Sigma V^T` (the official code)."""
    scaled = gram * weights
    vectors = torch.linalg.eigh(scaled @ scaled.mT).eigenvectors
    # The row norms are the singular values; square roots of the eigenvalues would keep only half of the digits.
    values = (vectors.mT @ scaled).norm(dim=1)
    root: Tensor = (vectors * values) @ vectors.mT
    return root
