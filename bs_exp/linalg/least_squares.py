"""The mathematics of the refit: the best coefficients on a fixed basis, from second moments of a layer's inputs.

X are the inputs on which a layer is refitted, and D, their drift, is the dense model's inputs minus X. The loss is
`||X B C - (X + beta D) W||_F^2`. With E = B C - W it is `tr(E^T X^T X E) - 2 beta tr(E^T X^T D W) + beta^2 ||D W||^2`,
which suffers less from cancellation than squares of outputs. All of it in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Moments are computed from fp32 products: eigenvalues below this share of the largest are rounding errors.
_RESOLUTION = torch.finfo(torch.float32).eps
# The range that SAES-SVD allows its coefficient.
_BETAS = (0.25, 0.75)


@dataclass(frozen=True, eq=False)
class InputPairs:
    """Second moments of inputs X and of their drift D, summed over tokens, in fp64; None where there is no drift."""

    gram: Float[Tensor, "d_in d_in"]
    cross: Float[Tensor, "d_in d_in"] | None = None  # X^T D
    drift: Float[Tensor, "d_in d_in"] | None = None  # D^T D

    def __add__(self, other: InputPairs) -> InputPairs:
        return InputPairs(self.gram + other.gram, _sum(self.cross, other.cross), _sum(self.drift, other.drift))

    @classmethod
    def of(cls, inputs: Float[Tensor, "tokens d_in"], dense: Float[Tensor, "tokens d_in"] | None) -> InputPairs:
        """The moments of one batch, multiplied in fp32 (or in the inputs' dtype, if finer) and converted to fp64."""
        x = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        gram = (x.mT @ x).double()
        if dense is None:
            return cls(gram)
        d = dense.to(x.dtype) - x
        return cls(gram, (x.mT @ d).double(), (d.mT @ d).double())


def squared_loss(
    product: Float[Tensor, "d_in columns"], weight: Float[Tensor, "d_in columns"], inputs: InputPairs, beta: float
) -> float:
    """`||X P - (X + beta D) W||_F^2` for the product P of the factors; at least 0, NaN if it is not finite."""
    error = product - weight
    loss = (error * (inputs.gram @ error)).sum()
    if beta and inputs.cross is not None and inputs.drift is not None:
        loss = loss - 2.0 * beta * (error * (inputs.cross @ weight)).sum()
        loss = loss + beta**2 * (weight * (inputs.drift @ weight)).sum()
    # Rounding can make a loss of 0 negative.
    return max(float(loss), 0.0) if bool(loss.isfinite()) else float("nan")


def refit_coefficients(
    basis: Float[Tensor, "d_in rank"],
    coefficients: Float[Tensor, "rank columns"],
    weight: Float[Tensor, "d_in columns"],
    inputs: InputPairs,
    *,
    beta: float,
    ridge: float,
    fixed: Float[Tensor, "d_in columns"] | None = None,
) -> Float[Tensor, "rank columns"]:
    """The coefficients of least loss on this basis; where the inputs leave them open, those nearest to the given ones.

    `fixed` is added to the product of basis and coefficients, such as the layers' corrections.

    `ridge`, in units of the Gram's mean diagonal, adds `ridge ||B (C - C_given)||_F^2` to the loss. Nearness is
    measured in the product too, so that only the span of the basis matters.
    """
    orthonormal, in_basis = _orthonormalise(basis)
    error = basis @ coefficients - weight
    gradient = inputs.gram @ (error if fixed is None else error + fixed)
    if beta and inputs.cross is not None:
        gradient = gradient - beta * (inputs.cross @ weight)
    step = _solve(orthonormal, inputs, -(orthonormal.mT @ gradient), ridge)
    return coefficients + in_basis(step)


def closed_form_beta(
    basis: Float[Tensor, "d_in rank"],
    weight: Float[Tensor, "d_in columns"],
    inputs: InputPairs,
    *,
    ridge: float,
    fixed: Float[Tensor, "d_in columns"] | None = None,
) -> float:
    """The beta within SAES-SVD's range, 0.25 to 0.75, whose target the basis can fit best.

    It maximises `||P T||_F / ||T||_F` for the target `T = (X + beta D) W` minus `X fixed`, where P projects onto the
    outputs that the basis can give: a quotient of two quadratics in beta (SAES-SVD, 2602.03051, ACES; there the basis
    is still free). Without drift it is 0.25.
    """
    if inputs.cross is None or inputs.drift is None:
        return _BETAS[0]
    orthonormal, _ = _orthonormalise(basis)
    rest = weight if fixed is None else weight - fixed
    here, there = inputs.gram @ rest, inputs.cross @ weight
    fits = [orthonormal.mT @ part for part in (here, there)]
    solved = _solve(orthonormal, inputs, torch.cat(fits, dim=1), ridge).split(weight.shape[1], dim=1)
    above = [float((fits[i] * solved[j]).sum()) for i, j in ((0, 0), (0, 1), (1, 1))]
    below = [float(x) for x in ((rest * here).sum(), (rest * there).sum(), (weight * (inputs.drift @ weight)).sum())]

    def quotient(beta: float) -> float:
        top, bottom = (q[0] + 2.0 * beta * q[1] + beta**2 * q[2] for q in (above, below))
        return top / bottom if bottom > 0.0 else 0.0

    low, high = _BETAS
    return max((low, *(root for root in _stationary(above, below) if low < root < high), high), key=quotient)


def _stationary(above: list[float], below: list[float]) -> list[float]:
    """The b at which the derivative of `(a0 + 2 a1 b + a2 b^2) / (c0 + 2 c1 b + c2 b^2)` is 0: a quadratic equation."""
    (a0, a1, a2), (c0, c1, c2) = above, below
    square, linear, constant = a2 * c1 - a1 * c2, a2 * c0 - a0 * c2, a1 * c0 - a0 * c1
    if square == 0.0:
        return [] if linear == 0.0 else [-constant / linear]
    discriminant = linear**2 - 4.0 * square * constant
    if discriminant < 0.0:
        return []
    return [(-linear + sign * discriminant**0.5) / (2.0 * square) for sign in (1.0, -1.0)]


def _solve(orthonormal: Tensor, inputs: InputPairs, right: Tensor, ridge: float) -> Tensor:
    """`(Q^T X^T X Q + ridge)^+ right`, with 0 in directions that the inputs do not reach."""
    if not orthonormal.shape[1]:  # the basis is zero
        return right
    normal = orthonormal.mT @ inputs.gram @ orthonormal
    values, vectors = torch.linalg.eigh((normal + normal.mT) / 2.0)
    largest = values[-1].clamp_min(0.0)
    shifted = values + ridge * inputs.gram.diagonal().mean()
    inverse = torch.where(shifted > _RESOLUTION * largest, 1.0 / shifted, 0.0).where(largest > 0.0, 0.0)
    solved: Tensor = vectors @ (inverse[:, None] * (vectors.mT @ right))
    return solved


def _orthonormalise(basis: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Orthonormal columns Q of the same span, and a map from coefficients on Q to the least-norm ones on the basis."""
    orthonormal, triangle = torch.linalg.qr(basis)
    diagonal, resolution = triangle.diagonal().abs(), torch.finfo(basis.dtype).eps * max(basis.shape)
    if float(diagonal.min()) > resolution * float(diagonal.max()):
        return orthonormal, lambda step: torch.linalg.solve_triangular(triangle, step, upper=True)
    # Columns of the basis depend on each other, so some of QR's lie outside its span.
    left, values, right = torch.linalg.svd(basis, full_matrices=False)
    kept = values > resolution * values[0]
    return left[:, kept], lambda step: right[kept].mT @ (step / values[kept, None])


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else one + other
