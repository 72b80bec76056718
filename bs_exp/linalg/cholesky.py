"""The square root of a Gram by Cholesky factorisation, damped where it must be."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.errors import DecompositionError


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
    scale = diagonal.where(diagonal > 0.0, mean).sqrt()
    unit = gram / scale[:, None] / scale
    shift = ridge
    lower, info = torch.linalg.cholesky_ex(_shifted(unit, shift))
    if int(info) != 0:
        lowest = float(torch.linalg.eigvalsh(unit)[0])
        # Rounding moves eigenvalues by about d * eps * norm, so a shift below that can fail again.
        rounding = unit.shape[0] * torch.finfo(torch.float64).eps * float(torch.linalg.matrix_norm(unit))
        shift += 2.0 * max(-lowest, 0.0) + rounding
        lower, info = torch.linalg.cholesky_ex(_shifted(unit, shift))
        if int(info) != 0:
            raise DecompositionError(
                f"the Gram is not positive definite (with channels scaled to unit second moments its lowest eigenvalue "
                f"is {lowest:.1e}) even with {shift:.1e} on its diagonal. Raise whitening.ridge or use more "
                "calibration sequences."
            )
    return (lower.mT * scale).contiguous(), shift * scale.square()


def _shifted(gram: Tensor, damping: float) -> Tensor:
    return gram + damping * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device) if damping else gram
