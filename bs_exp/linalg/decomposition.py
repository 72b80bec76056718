"""The mathematics of factorisation: whiten, decompose, truncate. No model, no configuration, no input or output.

`min_rank(k) ||X (W - W_k)||_F` has the solution `W_k = S^-1 [S W]_k` for any `S` with `S^T S = X^T X`
(SVD-LLM, section 3.1; Basis Sharing, section 3.1). All of it is in fp64: forming `X^T X` squares the condition number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.errors import DecompositionError
from bs_exp.linalg.corrections import corrected_energies
from bs_exp.linalg.scaling import balanced, by_layer, unscale
from bs_exp.types import Decomposition, Metric, SharedFactors, Spectrum, WeightGroup


def needs_left_root(group: WeightGroup) -> bool:
    """Whether the decomposition of a group takes the root S of its inputs' Gram, and not the Gram itself."""
    return _is_wide(group) or group.correction > 0


def needs_right_root(group: WeightGroup) -> bool:
    """Whether the decomposition of a group takes the roots R of its outputs' Grams, and not the Grams themselves."""
    return not _is_wide(group) or group.correction > 0


def decompose(group: WeightGroup, weight: Float[Tensor, "d_in columns"], metric: Metric) -> Decomposition:
    """All components of `A = S [W_1 R_1 .. W_n R_n]`, best first, from the smaller of `A A^T` and `A^T A`, in fp64.

    With `A = U Sigma V^T`: where `d_in <= columns`, `A A^T` gives U, and `basis = S^-1 U`, `coefficients = U^T S W`;
    elsewhere `A^T A` gives V, and `basis = W R V`, `coefficients = V^T R^-1`. So the larger side needs no root: where
    the metric has the Gram of it, `H = S^T S` or `G_i = R_i R_i^T`, the small matrix is `S (W G W^T) S^T` or
    `R^T (W^T H W) R`.

    Either way `basis @ coefficients` is the weight itself: U or V is orthogonal, even where inaccurate, and a loss is
    the norm of what is left out, not an eigenvalue. So it is the loss of these factors, whatever the condition of the
    Grams. Its square is above the optimum by some `rank * eps * ||A||^2` at most: eigenvectors of a squared matrix
    tell singular values apart down to `sqrt(eps)`, 1e-8, of the largest, where rounding the factors to fp32 costs more.
    Raises DecompositionError if the weight is not finite.
    """
    products = _products(group, weight, metric)
    vectors = torch.linalg.eigh(products.small).eigenvectors.flip(1)
    combined = vectors.mT @ products.rows
    squares = products.squares(vectors, combined)
    basis_t, coefficients = (_unwhiten(vectors, metric).mT, combined) if _is_wide(group) else (combined, vectors.mT)
    # Sums of squares are more accurate than eigenvalues of a squared matrix; sorted, they make a falling spectrum.
    order = squares.argsort(descending=True)
    basis_t, coefficients, squares = basis_t[order], coefficients[order], squares[order]
    energies = _energies(squares, basis_t, coefficients, metric)
    if group.correction:
        energies = corrected_energies(group, energies, basis_t, coefficients, metric)
    if products.coefficients_are_scaled:
        coefficients = by_layer(group, coefficients, metric, unscale)
    basis_t, coefficients = balanced(basis_t, coefficients)
    spectrum = Spectrum(
        group=group,
        singular_values=squares.sqrt(),
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
    squares = torch.linalg.eigvalsh(_products(group, weight, metric).small).flip(0).clamp_min(0.0)
    return Spectrum(
        group=group,
        singular_values=squares.sqrt(),
        energies=squares / 2.0 if metric.unit.is_second_order else squares,
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


@dataclass(frozen=True, eq=False)
class _Products:
    """`one @ other^T` is the smaller of `A A^T` and `A^T A`; combinations of `rows` make the other factor.

    `one` and `other` are A (or A^T) twice where the metric has roots, and `P` and `P G` where it has a Gram.
    """

    rows: Float[Tensor, "smaller larger"]
    one: Float[Tensor, "smaller larger"]
    other: Float[Tensor, "smaller larger"]
    coefficients_are_scaled: bool = True

    @property
    def small(self) -> Float[Tensor, "smaller smaller"]:
        return self.one @ self.other.mT

    def squares(self, vectors: Tensor, combined: Tensor) -> Float[Tensor, " smaller"]:
        """The squared singular values that belong to orthonormal columns, of which `combined` is `vectors^T rows`."""
        one = combined if self.one is self.rows else vectors.mT @ self.one
        other = one if self.other is self.one else vectors.mT @ self.other
        squares: Tensor = torch.linalg.vecdot(one, other)
        return squares.clamp_min(0.0)


def _is_wide(group: WeightGroup) -> bool:
    return group.d_in <= group.columns


def _products(group: WeightGroup, weight: Tensor, metric: Metric) -> _Products:
    weight = weight.double()
    if not bool(weight.isfinite().all()):
        raise DecompositionError("the weight holds NaN or infinite entries.")
    # In other units the ridge's share, and corrections, take coefficients that are scaled by R.
    if _is_wide(group) and metric.right_grams and metric.unit.is_second_order and not group.correction:
        rows = weight if metric.whitener is None else metric.whitener @ weight
        return _Products(rows, rows, _times_right_gram(group, rows, metric), coefficients_are_scaled=False)
    scaled = by_layer(group, weight, metric, lambda block, right: block @ right)
    if _is_wide(group):
        whitened = scaled if metric.whitener is None else metric.whitener @ scaled
        return _Products(whitened, whitened, whitened)
    if metric.left_gram is not None:
        return _Products(scaled.mT, scaled.mT, metric.left_gram.times(scaled).mT)
    whitened = scaled if metric.whitener is None else metric.whitener @ scaled
    return _Products(scaled.mT, whitened.mT, whitened.mT)


def _times_right_gram(group: WeightGroup, rows: Tensor, metric: Metric) -> Tensor:
    """Each layer's columns times `R R^T`."""
    assert metric.right is not None
    blocks = []
    for layer, block in zip(group.layers, rows.split(group.d_out, dim=1), strict=True):
        gram = metric.right_grams.get(layer)
        blocks.append(block @ metric.right[layer] @ metric.right[layer].mT if gram is None else gram.times(block.mT).mT)
    return torch.cat(blocks, dim=1)


def _energies(squares: Tensor, basis_t: Tensor, coefficients: Tensor, metric: Metric) -> Tensor:
    """The loss of dropping each component, in the unit of `Spectrum.energies`."""
    if metric.unit.is_second_order:
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
