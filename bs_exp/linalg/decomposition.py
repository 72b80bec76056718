"""The mathematics of factorisation: whiten, decompose, truncate. No model, no configuration, no input or output.

`min_rank(k) ||X (W - W_k)||_F` has the solution `W_k = S^-1 [S W]_k` for any `S` with `S^T S = X^T X`
(SVD-LLM, section 3.1; Basis Sharing, section 3.1). All of it is in fp64: forming `X^T X` squares the condition number.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bs_exp.errors import DecompositionError
from bs_exp.types import (
    Corrections,
    Decomposition,
    LossUnit,
    Metric,
    PivotedFactors,
    SharedFactors,
    Spectrum,
    StoredFactors,
    WeightGroup,
)

# Ranks at which losses after corrections are computed: each costs one eigenvalue problem per layer.
_CORRECTION_POINTS = 65


def cholesky_whitener(
    gram: Float[Tensor, "d d"], *, ridge: float = 0.0, of: str = "inputs"
) -> tuple[Float[Tensor, "d d"], float]:
    """`S` upper triangular with `S^T S = gram + added * I`, in fp64, and `added`, in units of the Gram.

    `ridge` is in units of the mean diagonal. A Gram that is still not positive definite gets twice the magnitude of its
    lowest eigenvalue, and an allowance for rounding, on top.
    Raises DecompositionError if the Gram is not finite, zero, or not positive definite even so; the message says what
    it is the Gram `of`.
    """
    gram = gram.double()
    if not bool(gram.isfinite().all()):
        raise DecompositionError(
            f"the Gram of the {of} holds NaN or infinite entries, so the calibration {of} did too. Load the model with "
            "model.dtype=float32 if it is not."
        )
    mean = float(gram.diagonal().mean())
    if mean <= 0.0:
        raise DecompositionError(
            f"the Gram's mean diagonal is {mean:.1e}: all {of} of these matrices are zero on the calibration text. "
            "If weights before them are huge, their outputs overflow in a norm, which then gives zeros: check the "
            "checkpoint, or load it with model.dtype=float32. If not, calibrate on other text, or use "
            "whitening=identity."
        )
    added = ridge * mean
    lower, info = torch.linalg.cholesky_ex(_shifted(gram, added))
    if int(info) != 0:
        lowest = float(torch.linalg.eigvalsh(gram)[0])
        # Rounding moves eigenvalues by about d * eps * norm, so a shift below that can fail again.
        rounding = gram.shape[0] * torch.finfo(torch.float64).eps * float(torch.linalg.matrix_norm(gram))
        added += 2.0 * max(-lowest, 0.0) + rounding
        lower, info = torch.linalg.cholesky_ex(_shifted(gram, added))
        if int(info) != 0:
            raise DecompositionError(
                f"the Gram is not positive definite (lowest eigenvalue {lowest:.1e}, mean diagonal {mean:.1e}) even "
                f"with {added:.1e} on its diagonal. Raise whitening.ridge or use more calibration sequences."
            )
    return lower.mT.contiguous(), added


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
        energies = _corrected_energies(group, energies, basis_t, coefficients, metric)
    coefficients = _by_layer(group, coefficients, metric, _unscale)
    basis_t, coefficients = _balanced(basis_t, coefficients)
    spectrum = Spectrum(
        group=group,
        singular_values=values,
        energies=energies,
        ridge=metric.ridge,
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
        ridge=metric.ridge,
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
    scaled = _by_layer(group, coefficients.double(), metric, lambda block, right: block @ right)
    units_t, rows = _orthonormal(basis_t.double(), scaled, metric)
    found = {}
    for layer, tail in zip(group.layers, rows[rank:].split(group.d_out, dim=1), strict=True):
        left, values, right = torch.linalg.svd(tail, full_matrices=False)
        left, values, right = left[:, : group.correction], values[: group.correction], right[: group.correction]
        own = values[:, None] * right
        if metric.right is not None:
            own = _unscale(own, metric.right[layer])
        down_t, own = _balanced(left.mT @ units_t[rank:], own)
        found[layer] = (down_t.mT, own)
    return found


def _orthonormal(basis_t: Tensor, rows: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """The same product with basis vectors rescaled to length 1 in the metric, so that norms of rows are errors."""
    in_metric = basis_t if metric.whitener is None else basis_t @ metric.whitener.mT
    lengths = in_metric.norm(dim=1)
    lengths = lengths.where(lengths > 0, 1.0)[:, None]
    return basis_t / lengths, rows * lengths


def _corrected_energies(
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
    overlap = units_t @ units_t.mT if metric.ridge and metric.unit is not LossUnit.NATS else None
    left = []
    for rank in points:
        total = 0.0
        for tail in rows[rank:].split(group.d_out, dim=1):
            lost = tail - _leading(tail, group.correction)
            total += float(lost.square().sum())
            if overlap is not None:  # the ridge's share is no error on any input
                total -= metric.ridge * float((lost * (overlap[rank:, rank:] @ lost)).sum())
        left.append(max(total, 0.0) * (0.5 if metric.unit is LossUnit.NATS else 1.0))
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


def _whitened(group: WeightGroup, weight: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """`[W_1 R_1 .. W_n R_n]` and `S` times that, in fp64."""
    weight = weight.double()
    if not bool(weight.isfinite().all()):
        raise DecompositionError("the weight holds NaN or infinite entries.")
    scaled = _by_layer(group, weight, metric, lambda block, right: block @ right)
    return scaled, scaled if metric.whitener is None else metric.whitener @ scaled


def pivoted_form(factors: SharedFactors) -> PivotedFactors:
    """Factors of the same product, in fp64, one of which holds a k x k identity that is left out.

    A single matrix uses k independent columns J of C (outputs), `B C = (B C_J)(C_J^-1 C)`. A shared basis uses k
    independent rows J of B (inputs), `B C = (B B_J^-1)(B_J C)`, since every layer computes with it. J is chosen by QR
    with column pivoting, so that the stored numbers stay small and well conditioned.
    """
    group, basis = factors.group, factors.basis.double()
    coefficients = {layer: c.double() for layer, c in factors.coefficients.items()}
    if group.size == 1:
        (layer,) = group.layers
        own, others = _interpolation(coefficients[layer])
        basis, coefficients = basis @ coefficients[layer][:, own], {layer: others}
    else:
        whole = torch.cat([coefficients[layer] for layer in group.layers], dim=1)
        # Rows with the norms and angles of the product's rows: inputs are chosen by their effect on the outputs.
        rows = basis @ torch.linalg.qr(whole.mT, mode="r").R.mT
        own, others = _interpolation(rows.mT)
        basis, coefficients = others.mT, {layer: basis[own] @ c for layer, c in coefficients.items()}
    return PivotedFactors(group, basis, coefficients, own, factors.corrections)


def plain_form(factors: StoredFactors) -> SharedFactors:
    """The same factors as plain ones in fp64: pivoted factors get their identity back."""
    group, basis = factors.group, factors.basis.double()
    coefficients = {layer: c.double() for layer, c in factors.coefficients.items()}
    corrections = {layer: (down.double(), own.double()) for layer, (down, own) in factors.corrections.items()}
    if isinstance(factors, PivotedFactors):
        pivots = factors.pivots.to(basis.device)
        if group.size == 1:
            coefficients = {layer: _with_identity(c, pivots) for layer, c in coefficients.items()}
        else:
            basis = _with_identity(basis.mT, pivots).mT
    return SharedFactors(group, basis, coefficients, corrections)


def _interpolation(matrix: Float[Tensor, "k n"]) -> tuple[Bool[Tensor, " n"], Float[Tensor, "k others"]]:
    """k columns J of a matrix, and the combinations `M_J^-1 M` of them that give its other columns.

    By QR with column pivoting. The chosen columns keep their order, so that one bit per column records the choice.
    """
    rank, width = matrix.shape
    triangle, order = scipy.linalg.qr(matrix.cpu().numpy(), mode="r", pivoting=True)
    columns = torch.from_numpy(order[:rank].copy()).long().sort()
    # A matrix of lower rank has rows of zeros in the triangle: these columns contribute nothing to the others.
    true_rank = int(np.count_nonzero(np.diagonal(triangle)[:rank]))
    found = np.zeros((rank, width - rank))
    found[:true_rank] = scipy.linalg.solve_triangular(triangle[:true_rank, :true_rank], triangle[:true_rank, rank:])
    others = torch.zeros(rank, width, dtype=torch.float64)
    others[:, torch.from_numpy(order[rank:].copy()).long()] = torch.from_numpy(found)[columns.indices]
    own = torch.zeros(width, dtype=torch.bool)
    own[columns.values] = True
    return own.to(matrix.device), others[:, ~own].to(matrix.device)


def _with_identity(others: Float[Tensor, "k others"], own: Bool[Tensor, " n"]) -> Float[Tensor, "k n"]:
    """The full matrix: the identity in the columns `own`, and `others` in the remaining columns."""
    whole = others.new_zeros(others.shape[0], len(own))
    whole[:, own] = torch.eye(others.shape[0], dtype=others.dtype, device=others.device)
    whole[:, ~own] = others
    return whole


def _shifted(gram: Tensor, damping: float) -> Tensor:
    return gram + damping * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device) if damping else gram


def _by_layer(group: WeightGroup, columns: Tensor, metric: Metric, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The columns after `apply(block, right)` on each layer's block of columns; unchanged without right factors."""
    if metric.right is None:
        return columns
    blocks = zip(group.layers, columns.split(group.d_out, dim=1), strict=True)
    return torch.cat([apply(block, metric.right[layer]) for layer, block in blocks], dim=1)


def _unscale(block: Tensor, right: Tensor) -> Tensor:
    unscaled: Tensor = torch.linalg.solve_triangular(right, block, upper=False, left=False)
    return unscaled


def _energies(values: Tensor, basis_t: Tensor, coefficients: Tensor, metric: Metric) -> Tensor:
    """The loss of dropping each component, in the unit of `Spectrum.energies`."""
    squares = values.square()
    if metric.unit is LossUnit.NATS:
        half: Tensor = squares / 2.0
        return half
    # One side of every component is orthogonal to that of the others, so errors add up over components, with or without
    # the ridge. The ridge's share is known exactly; it is subtracted, since it is no error on any input.
    norms = basis_t.norm(dim=1) * coefficients.norm(dim=1)
    without_ridge: Tensor = squares - metric.ridge * norms.square()
    return without_ridge.clamp_min(0.0)


def _unwhiten(left: Tensor, metric: Metric) -> Tensor:
    if metric.whitener is None:
        return left
    unwhitened: Tensor = torch.linalg.solve_triangular(metric.whitener, left, upper=True)
    return unwhitened


def _balanced(basis_t: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with equal norms on both sides of every component: fp16 holds neither 1e5 nor 1e-8."""
    left, right = basis_t.norm(dim=1), coefficients.norm(dim=1)
    usable = (left > 0) & (right > 0)
    scale = torch.where(usable, (right / left.where(usable, 1.0)).sqrt(), 1.0)
    scale = scale.where(scale > 0, 1.0)
    return basis_t * scale[:, None], coefficients / scale[:, None]
