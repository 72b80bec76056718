"""Symmetric matrices with every number stored once."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

# Rows and columns that are mirrored at a time: a block of both fits into a core's cache.
_BLOCK = 256


def pack_symmetric(matrix: Float[Tensor, "d d"], dtype: torch.dtype) -> Float[Tensor, " packed"]:
    """The upper half, diagonal included, row by row: `d (d + 1) / 2` numbers in a dtype."""
    size = len(matrix)
    packed = torch.empty(size * (size + 1) // 2, dtype=dtype)
    start = 0
    for row in range(size):
        packed[start : start + size - row] = matrix[row, row:]
        start += size - row
    return packed


def unpack_symmetric(packed: Float[Tensor, " packed"]) -> Float[Tensor, "d d"]:
    """The inverse of `pack_symmetric`, in fp64; what stood below the diagonal is the upper half now."""
    size = (math.isqrt(8 * len(packed) + 1) - 1) // 2
    matrix = torch.empty(size, size, dtype=torch.float64)
    start = 0
    for row in range(size):
        matrix[row, row:] = packed[start : start + size - row]
        start += size - row
    for first in range(0, size, _BLOCK):
        last = min(first + _BLOCK, size)
        corner = matrix[first:last, first:last].triu()
        matrix[first:last, first:last] = corner + corner.triu(1).mT
        matrix[last:, first:last] = matrix[first:last, last:].mT
    return matrix
