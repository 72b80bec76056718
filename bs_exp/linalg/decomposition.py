"""The mathematics of factorisation: whiten, decompose, truncate. No model, no configuration, no input or output.

`min_rank(k) ||X (W - W_k)||_F` has the solution `W_k = S^-1 [S W]_k` for any `S` with `S^T S = X^T X`
(SVD-LLM, section 3.1; Basis Sharing, section 3.1). All of it is in fp64: forming `X^T X` squares the condition number.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.errors import DecompositionError
from bs_exp.linalg.corrections import corrected_energies
from bs_exp.linalg.scaling import balanced, by_layer, unscale
from bs_exp.types import Decomposition, LossUnit, Metric, SharedFactors, Spectrum, WeightGroup


def decompose(group: WeightGroup, weight: Float[Tensor, "d_in columns"], metric: Metric) -> Decomposition:
    """All components of `A = S [W_1 R_1 .. W_n R_n]`, best first, from eigenvectors of `A A^T` or `A^T A`, in fp64.

    With `A = U Sigma V^T`: where `d_in <= columns`, `A A^T` gives U, and `basis = S^-1 U`, `coefficients = U^T A R^-1`;
    elsewhere `A^T A` gives V, and `basis = W R V`, `coefficients = V^T R^-1` (the output-covariance form, no inverse of
    S at all). Either way `basis @ coefficients` is the weight itself: U or V is orthogonal, even where inaccurate.
    Raises DecompositionError if the weight is not finite.
    """
    scaled, whitened = _whitened(group, weight, metric)
    if weight.shape[0] <= weight.shape[1]:
        left = torch.linalg.eigh(whitened @ whitened.mT).eigenvectors.flip(1)
        basis_t = _unwhiten(left, metric).mT
        coefficients = left.mT @ whitened
        values = coefficients.norm(dim=1)
    else:
        coefficients = torch.linalg.eigh(whitened.mT @ whitened).eigenvectors.flip(1).mT
        basis_t = coefficients @ scaled.mT
        values = (coefficients @ whitened.mT).norm(dim=1)
    # Norms are more accurate than the eigenvalues of a squared matrix; sorting by them keeps the spectrum monotone.
    order = values.argsort(descending=True)
    basis_t, coefficients, values = basis_t[order], coefficients[order], values[order]
    energies = _energies(values, basis_t, coefficients, metric)
    if group.correction:
        energies = corrected_energies(group, energies, basis_t, coefficients, metric)
    coefficients = by_layer(group, coefficients, metric, unscale)
    basis_t, coefficients = balanced(basis_t, coefficients)
    spectrum = Spectrum(
        group=group,
        singular_values=values,
        energies=energies,
        ridge=metric.mean_ridge,
        unit=metric.unit,
        damping=metric.damping,
    )
    return Decomposition(spectrum=spectrum, basis_t=basis_t, coefficients=coefficients)


def spectrum_of(group: WeightGroup, weight: Float[Tensor, "d_in columns"], metric: Metric) -> Spectrum:
    """The spectrum alone, from eigenvalues: for comparing many candidate groups of which few are factorised.

    Singular values have errors up to `sqrt(eps)` of the largest one, and squared losses in the unit of a norm include
    the share of the ridge, which `decompose` subtracts. With corrections, eigenvalues do not determine the losses, so
    the spectrum is that of `decompose`.
    Raises DecompositionError if the weight is not finite.
    """
    if group.correction:
        return decompose(group, weight, metric).spectrum
    _, whitened = _whitened(group, weight, metric)
    square = whitened @ whitened.mT if whitened.shape[0] <= whitened.shape[1] else whitened.mT @ whitened
    squares = torch.linalg.eigvalsh(square).flip(0).clamp_min(0.0)
    return Spectrum(
        group=group,
        singular_values=squares.sqrt(),
        energies=squares / 2.0 if metric.unit is LossUnit.NATS else squares,
        ridge=metric.mean_ridge,
        unit=metric.unit,
        damping=metric.damping,
    )


def split_by_layer(
    group: WeightGroup, basis_t: Float[Tensor, "rank d_in"], coefficients: Float[Tensor, "rank columns"]
) -> SharedFactors:
    """One basis and one coefficient matrix per layer, as views of the first `rank` components of a group."""
    parts = coefficients.split(group.d_out, dim=1)
    return SharedFactors(group=group, basis=basis_t.mT, coefficients=dict(zip(group.layers, parts, strict=True)))


def truncate(decomposition: Decomposition, rank: int) -> SharedFactors:
    """The best factors of a given rank.

    Raises ValueError if the rank is below 1 or above the group's full rank.
    """
    group = decomposition.spectrum.group
    if not 1 <= rank <= group.full_rank:
        raise ValueError(f"rank of {group.name} must be between 1 and {group.full_rank}, got {rank}.")
    return split_by_layer(group, decomposition.basis_t[:rank], decomposition.coefficients[:rank])


def _whitened(group: WeightGroup, weight: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """`[W_1 R_1 .. W_n R_n]` and `S` times that, in fp64."""
    weight = weight.double()
    if not bool(weight.isfinite().all()):
        raise DecompositionError("the weight holds NaN or infinite entries.")
    scaled = by_layer(group, weight, metric, lambda block, right: block @ right)
    return scaled, scaled if metric.whitener is None else metric.whitener @ scaled


def _energies(values: Tensor, basis_t: Tensor, coefficients: Tensor, metric: Metric) -> Tensor:
    """The loss of dropping each component, in the unit of `Spectrum.energies`."""
    squares = values.square()
    if metric.unit is LossUnit.NATS:
        half: Tensor = squares / 2.0
        return half
    # One side of every component is orthogonal to that of the others, so errors add up over components, with or without
    # the ridge. The ridge's share is known exactly; it is subtracted, since it is no error on any input.
    share = (metric.ridge * basis_t.square()).sum(dim=1) * coefficients.square().sum(dim=1)
    without_ridge: Tensor = squares - share
    return without_ridge.clamp_min(0.0)


def _unwhiten(left: Tensor, metric: Metric) -> Tensor:
    if metric.whitener is None:
        return left
    unwhitened: Tensor = torch.linalg.solve_triangular(metric.whitener, left, upper=True)
    return unwhitened
