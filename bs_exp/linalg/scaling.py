"""Scalings of factors: each layer's columns by its right factor, and components to equal norms on both sides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bs_exp.types import Metric, WeightGroup


def by_layer(group: WeightGroup, columns: Tensor, metric: Metric, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The columns after `apply(block, right)` on each layer's block of columns; unchanged without right factors."""
    if metric.right is None:
        return columns
    blocks = zip(group.layers, columns.split(group.d_out, dim=1), strict=True)
    return torch.cat([apply(block, metric.right[layer]) for layer, block in blocks], dim=1)


def unscale(block: Tensor, right: Tensor) -> Tensor:
    unscaled: Tensor = torch.linalg.solve_triangular(right, block, upper=False, left=False)
    return unscaled


def balanced(basis_t: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with equal norms on both sides of every component: fp16 holds neither 1e5 nor 1e-8."""
    left, right = basis_t.norm(dim=1), coefficients.norm(dim=1)
    usable = (left > 0) & (right > 0)
    scale = torch.where(usable, (right / left.where(usable, 1.0)).sqrt(), 1.0)
    scale = scale.where(scale > 0, 1.0)
    return basis_t * scale[:, None], coefficients / scale[:, None]
