"""Distances between the leading left singular subspaces of matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def left_subspace(matrix: Float[Tensor, "d_in d_out"], dimension: int) -> Float[Tensor, "d_in dimension"]:
    """Orthonormal basis of the span of the first `dimension` left singular vectors, from an eigendecomposition."""
    if matrix.shape[0] <= matrix.shape[1]:
        vectors: Tensor = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[:, -dimension:]
        return vectors
    right = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[:, -dimension:]
    basis: Tensor = torch.linalg.qr(matrix @ right).Q
    return basis


def subspace_distances(bases: Sequence[Float[Tensor, "d_in dimension"]]) -> Float[Tensor, "n n"]:
    """`||U_a U_a^T - U_b U_b^T||_F` for every pair, in units of its largest possible value `sqrt(2 t)`: 0 to 1.

    It is `sqrt(2 t - 2 ||U_a^T U_b||_F^2)`, so no projector is ever formed.
    """
    dimension = bases[0].shape[1]
    distances = torch.zeros(len(bases), len(bases), dtype=torch.float64)
    for a, first in enumerate(bases):
        for b in range(a + 1, len(bases)):
            common = float((first.mT @ bases[b]).square().sum()) / dimension
            distances[a, b] = distances[b, a] = math.sqrt(max(1.0 - common, 0.0))
    return distances
