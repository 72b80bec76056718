"""The square root of a Gram by Cholesky factorisation, damped where it must be."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.errors import DecompositionError
from bs_exp.types import GramRoot


def damped_root(
    gram: Float[Tensor, "d d"], *, ridge: float, needed: bool, of: str = "inputs"
) -> tuple[Float[Tensor, "d d"] | GramRoot, Float[Tensor, " d"]]:
    """The root that `cholesky_whitener` gives, made now if it is `needed`, and what was added to the diagonal.

    A Gram of which no root is made needs not be positive definite: nothing but `ridge` is added to it.
    Raises DecompositionError as `cholesky_whitener` does; for a Gram that has no root, when that is first made.
    """
    if needed:
        return cholesky_whitener(gram, ridge=ridge, of=of)
    found = damped(gram, ridge=ridge, of=of)
    return found, found.added


def damped(gram: Float[Tensor, "d d"], *, ridge: float, of: str) -> GramRoot:
    """The Gram with `ridge` added as a share of its diagonal, and its root, which is made when it is first asked for.

    Raises DecompositionError as `cholesky_whitener` does, for a Gram that has no root when that is first made.
    """
    gram = gram.double()
    added = ridge * _scale(gram, of).square()
    return GramRoot(gram, added, lambda: cholesky_whitener(gram, ridge=ridge, of=of)[0])


def definite(gram: Float[Tensor, "d d"], *, ridge: float, of: str) -> GramRoot:
    """As `damped`, with all that a positive definite Gram needs on its diagonal, which may be more than `ridge`.

    Only where rounding may eat up the ridge does that take the factorisation at once. Raises DecompositionError as
    `cholesky_whitener` does.
    """
    # The norm of a matrix with a unit diagonal is at most d.
    if ridge > len(gram) ** 2 * torch.finfo(torch.float64).eps:
        return damped(gram, ridge=ridge, of=of)
    root, added = cholesky_whitener(gram, ridge=ridge, of=of)
    return GramRoot(gram.double(), added, lambda: root)


def cholesky_whitener(
    gram: Float[Tensor, "d d"], *, ridge: float = 0.0, of: str = "inputs"
) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]]:
    """`S` upper triangular with `S^T S = gram + diag(added)`, in fp64, and `added` by channel, in units of the Gram.

    The Gram is scaled to a unit diagonal, `gram = D C D`, damped, `C + ridge * I`, factorised and scaled back: so
    `added` is a share of each channel's own second moment, and the result does not depend on the scale of channels. A
    share of the mean instead buries all others under one channel of large activations. A channel that is always zero
    counts as one of mean size. A `C` that is still not positive definite gets twice the magnitude of its lowest
    eigenvalue, and an allowance for rounding, on top.
    Raises DecompositionError if the Gram is not finite, zero, or not positive definite even so; the message says what
    it is the Gram `of`.
    """
    gram = gram.double()
    scale = _scale(gram, of)
    unit = (gram / scale[:, None]).div_(scale)
    unit.diagonal().add_(ridge)
    shift = ridge
    lower, info = torch.linalg.cholesky_ex(unit)
    if int(info) != 0:
        unit.diagonal().sub_(ridge)
        lowest = float(torch.linalg.eigvalsh(unit)[0])
        # Rounding moves eigenvalues by about d * eps * norm, so a shift below that can fail again.
        rounding = unit.shape[0] * torch.finfo(torch.float64).eps * float(torch.linalg.matrix_norm(unit))
        shift += 2.0 * max(-lowest, 0.0) + rounding
        unit.diagonal().add_(shift)
        lower, info = torch.linalg.cholesky_ex(unit)
        if int(info) != 0:
            raise DecompositionError(
                f"the Gram is not positive definite (with channels scaled to unit second moments its lowest eigenvalue "
                f"is {lowest:.1e}) even with {shift:.1e} on its diagonal. Raise whitening.ridge or use more "
                "calibration sequences."
            )
    del unit
    return lower.mul_(scale[:, None]).mT.contiguous(), shift * scale.square()


def solve_definite(matrix: Float[Tensor, "d d"], right: Float[Tensor, "d columns"]) -> Float[Tensor, "d columns"]:
    """The solution X of `matrix X = right` for a symmetric matrix without negative eigenvalues, in its dtype.

    By Cholesky factorisation; where the matrix has no full rank to the digits of its dtype, the X of least norm, scaled
    to a unit diagonal, without the directions in which there is nothing.
    """
    scale = matrix.diagonal().clamp_min(0.0).sqrt()
    scale = scale.where(scale > 0.0, 1.0)
    unit = matrix / scale[:, None] / scale
    unit = (unit + unit.mT) / 2.0
    lower, info = torch.linalg.cholesky_ex(unit)
    resolution = torch.finfo(matrix.dtype).eps * len(matrix)
    if int(info) == 0 and float(lower.diagonal().min()) ** 2 > resolution:
        return torch.cholesky_solve(right / scale[:, None], lower) / scale[:, None]
    values, vectors = torch.linalg.eigh(unit)
    inverse = torch.where(values > resolution * values[-1].clamp_min(1.0), 1.0 / values, 0.0)
    solved: Tensor = vectors @ (inverse[:, None] * (vectors.mT @ (right / scale[:, None])))
    return solved / scale[:, None]


def _scale(gram: Float[Tensor, "d d"], of: str) -> Float[Tensor, " d"]:
    """Roots of the diagonal, with the mean in place of zeros; DecompositionError if the Gram is not finite, or zero."""
    if not bool(gram.isfinite().all()):
        raise DecompositionError(
            f"the Gram of the {of} holds NaN or infinite entries, so the calibration {of} did too. Load the model with "
            "model.dtype=float32 if it is not."
        )
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0.0:
        raise DecompositionError(
            f"the Gram's mean diagonal is {mean:.1e}: all {of} of these matrices are zero on the calibration text. "
            "If weights before them are huge, their outputs overflow in a norm, which then gives zeros: check the "
            "checkpoint, or load it with model.dtype=float32. If not, calibrate on other text, or use "
            "whitening=identity."
        )
    return diagonal.where(diagonal > 0.0, mean).sqrt()
