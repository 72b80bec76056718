"""What every layer of a group has for itself, besides the factors that it shares: a term of low rank."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.linalg.scaling import balanced, by_layer, unscale
from bs_exp.types import Corrections, Metric, WeightGroup

# Ranks at which losses after corrections are computed: each costs one eigenvalue problem per layer.
_CORRECTION_POINTS = 65


def corrections_of(
    group: WeightGroup,
    basis_t: Float[Tensor, "full_rank d_in"],
    coefficients: Float[Tensor, "full_rank columns"],
    metric: Metric,
    rank: int,
) -> Corrections:
    """Each layer's correction: in the metric, the best factors of what the first `rank` components leave of it.

    Their rank is `group.correction` at most; all in fp64.
    """
    scaled = by_layer(group, coefficients.double(), metric, lambda block, right: block @ right)
    units_t, rows = _orthonormal(basis_t.double(), scaled, metric)
    found = {}
    for layer, tail in zip(group.layers, rows[rank:].split(group.d_out, dim=1), strict=True):
        left, values, right = torch.linalg.svd(tail, full_matrices=False)
        left, values, right = left[:, : group.correction], values[: group.correction], right[: group.correction]
        own = values[:, None] * right
        if metric.right is not None:
            own = unscale(own, metric.right[layer])
        down_t, own = balanced(left.mT @ units_t[rank:], own)
        found[layer] = (down_t.mT, own)
    return found


def _orthonormal(basis_t: Tensor, rows: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """The same product with basis vectors rescaled to length 1 in the metric, so that norms of rows are errors."""
    in_metric = basis_t if metric.whitener is None else basis_t @ metric.whitener.mT
    lengths = in_metric.norm(dim=1)
    lengths = lengths.where(lengths > 0, 1.0)[:, None]
    return basis_t / lengths, rows * lengths


def corrected_energies(
    group: WeightGroup, energies: Tensor, basis_t: Tensor, coefficients: Tensor, metric: Metric
) -> Tensor:
    """Energies whose tails are the losses after every layer's correction.

    The correction removes the largest singular values of what k components leave of a layer. That is computed at up to
    `_CORRECTION_POINTS` ranks k, at all of them in small groups; between them the remaining share of the loss is
    interpolated.
    """
    units_t, rows = _orthonormal(basis_t, coefficients, metric)
    tails = energies.flip(0).cumsum(0).flip(0)
    full = len(energies)
    # Denser towards both ends, where the share changes its slope most.
    angles = np.linspace(0.0, np.pi, _CORRECTION_POINTS)
    spread = np.unique(np.rint((full - 1) * (1.0 - np.cos(angles)) / 2.0).astype(int)).tolist()
    points = list(range(full)) if full <= _CORRECTION_POINTS else spread
    overlap = None
    if metric.mean_ridge and not metric.unit.is_second_order:
        overlap = (metric.ridge * units_t) @ units_t.mT
    left = []
    for rank in points:
        total = 0.0
        for tail in rows[rank:].split(group.d_out, dim=1):
            lost = tail - _leading(tail, group.correction)
            total += float(lost.square().sum())
            if overlap is not None:  # the ridge's share is no error on any input
                total -= float((lost * (overlap[rank:, rank:] @ lost)).sum())
        left.append(max(total, 0.0) * (0.5 if metric.unit.is_second_order else 1.0))
    shares = torch.tensor(left, dtype=tails.dtype) / tails[points].cpu().clamp_min(torch.finfo(tails.dtype).tiny)
    between = torch.from_numpy(np.interp(range(full), points, shares.clamp(0.0, 1.0).numpy())).to(tails)
    losses = torch.cat([(tails * between).cummin(0).values, tails.new_zeros(1)])
    corrected: Tensor = losses[:-1] - losses[1:]
    return corrected


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank, from eigenvectors of the smaller of `M M^T` and `M^T M`."""
    if matrix.shape[0] < matrix.shape[1]:
        return _leading(matrix.mT, rank).mT
    vectors = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[:, -rank:]
    leading: Tensor = (matrix @ vectors) @ vectors.mT
    return leading
