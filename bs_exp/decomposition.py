"""The mathematics of factorisation: whiten, decompose, truncate. No model, no configuration, no input or output.

`min_rank(k) ||X (W - W_k)||_F` has the solution `W_k = S^-1 [S W]_k` for any `S` with `S^T S = X^T X`
(SVD-LLM, section 3.1; Basis Sharing, section 3.1). All of it is in fp64: forming `X^T X` squares the condition number.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.errors import DecompositionError
from bs_exp.types import Decomposition, Metric, SharedFactors, Spectrum, WeightGroup


def gram_metric(gram: Float[Tensor, "d d"], *, ridge: float = 0.0) -> Metric:
    """The metric `||S dW||_F` with `S` upper triangular and `S^T S = gram + ridge * mean(diag(gram)) * I`.

    A Gram that is still not positive definite gets twice the size of its lowest eigenvalue on top. `Metric.ridge` is
    what was added to the diagonal, in units of the Gram.
    Raises DecompositionError if the Gram is not finite, or zero.
    """
    gram = gram.double()
    if not bool(gram.isfinite().all()):
        raise DecompositionError("the Gram holds NaN or infinite entries, so the calibration inputs did too.")
    mean = float(gram.diagonal().mean())
    if mean <= 0.0:
        raise DecompositionError(
            f"the Gram's mean diagonal is {mean:.1e}: all calibration inputs of these matrices are zero. "
            "Calibrate on other text, or use whitening=identity."
        )
    damping = ridge * mean
    lower, info = torch.linalg.cholesky_ex(_shifted(gram, damping))
    if int(info) != 0:
        lowest = float(torch.linalg.eigvalsh(gram)[0])
        # Rounding moves eigenvalues by about d * eps * norm, so a shift below that can fail again.
        rounding = gram.shape[0] * torch.finfo(torch.float64).eps * float(torch.linalg.matrix_norm(gram))
        damping += 2.0 * max(-lowest, 0.0) + rounding
        lower, info = torch.linalg.cholesky_ex(_shifted(gram, damping))
        if int(info) != 0:
            raise DecompositionError(
                f"the Gram is not positive definite (lowest eigenvalue {lowest:.1e}, mean diagonal {mean:.1e}) even "
                f"with {damping:.1e} on its diagonal. Raise whitening.ridge or use more calibration sequences."
            )
    return Metric(whitener=lower.mT.contiguous(), ridge=damping)


def decompose(group: WeightGroup, weight: Float[Tensor, "d_in columns"], metric: Metric) -> Decomposition:
    """All components of `S @ weight`, best first, from the eigenvectors of the smaller of its two products.

    With `A = S W = U Sigma V^T`: where `d_in <= columns`, `A A^T` gives U, and `basis = S^-1 U`, `coefficients = U^T A`;
    elsewhere `A^T A` gives V, and `basis = W V`, `coefficients = V^T` (the output-covariance form, no inverse at all).
    Either way `basis @ coefficients` is the weight itself, since U or V is orthogonal whatever its accuracy.
    Raises DecompositionError if the weight is not finite.
    """
    weight = weight.double()
    if not bool(weight.isfinite().all()):
        raise DecompositionError("the weight holds NaN or infinite entries.")
    whitened = weight if metric.whitener is None else metric.whitener @ weight
    if weight.shape[0] <= weight.shape[1]:
        left = torch.linalg.eigh(whitened @ whitened.mT).eigenvectors.flip(1)
        basis_t = _unwhiten(left, metric).mT
        coefficients = left.mT @ whitened
        values = coefficients.norm(dim=1)
    else:
        right = torch.linalg.eigh(whitened.mT @ whitened).eigenvectors.flip(1)
        basis_t = (weight @ right).mT
        coefficients = right.mT
        values = (whitened @ right).norm(dim=0)
    # Norms are more accurate than the eigenvalues of a squared matrix; sorting by them keeps the spectrum monotone.
    order = values.argsort(descending=True)
    basis_t, coefficients, values = basis_t[order], coefficients[order], values[order]
    # One side of every component is orthogonal to that of the others, so errors add up by component, also without ridge.
    norms = basis_t.norm(dim=1) * coefficients.norm(dim=1)
    energies = (values.square() - metric.ridge * norms.square()).clamp_min(0.0)
    basis_t, coefficients = _balanced(basis_t, coefficients)
    spectrum = Spectrum(group=group, singular_values=values, energies=energies, ridge=metric.ridge)
    return Decomposition(spectrum=spectrum, basis_t=basis_t, coefficients=coefficients)


def split_by_layer(
    group: WeightGroup, basis_t: Float[Tensor, "rank d_in"], coefficients: Float[Tensor, "rank columns"]
) -> SharedFactors:
    """One basis and one coefficient matrix per layer from the first `rank` components of a group."""
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


def _shifted(gram: Tensor, damping: float) -> Tensor:
    return gram + damping * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device) if damping else gram


def _unwhiten(left: Tensor, metric: Metric) -> Tensor:
    if metric.whitener is None:
        return left
    return torch.linalg.solve_triangular(metric.whitener, left, upper=True)


def _balanced(basis_t: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with equal norms on both sides of every component: fp16 holds neither 1e5 nor 1e-8."""
    left, right = basis_t.norm(dim=1), coefficients.norm(dim=1)
    usable = (left > 0) & (right > 0)
    scale = torch.where(usable, (right / left.where(usable, 1.0)).sqrt(), 1.0)
    scale = scale.where(scale > 0, 1.0)
    return basis_t * scale[:, None], coefficients / scale[:, None]
