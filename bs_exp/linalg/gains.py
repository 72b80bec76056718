"""Gains on the directions of a product: a number for each component, by least squares, where it holds elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.linalg.least_squares import InputPairs


@dataclass(frozen=True, eq=False)
class GainLoss:
    """`||X B diag(g) C - T||_F^2` as a function of the gains g: `g^T A g - 2 b^T g`, and a constant.

    With `T = (X + D) W - X F`: `A = (B^T X^T X B) o (C C^T)` and `b = diag(B^T X^T T C^T)`.
    """

    square: Float[Tensor, "rank rank"]
    linear: Float[Tensor, " rank"]

    @classmethod
    def of(
        cls,
        basis: Float[Tensor, "d_in rank"],
        coefficients: Float[Tensor, "rank columns"],
        weight: Float[Tensor, "d_in columns"],
        inputs: InputPairs,
        fixed: Float[Tensor, "d_in columns"] | None = None,
    ) -> GainLoss:
        """On moments of inputs X and of their drift D; `fixed`, F, is added to the product."""
        wanted = inputs.gram @ (weight if fixed is None else weight - fixed)
        if inputs.cross is not None:
            wanted = wanted + inputs.cross @ weight
        square = (basis.mT @ inputs.gram @ basis) * (coefficients @ coefficients.mT)
        return cls(square, torch.linalg.vecdot(basis.mT @ wanted, coefficients))

    def at(self, gains: Float[Tensor, " rank"]) -> float:
        """The loss, less its constant."""
        return float(gains @ self.square @ gains - 2.0 * self.linear @ gains)

    def best(self, ridge: float) -> Float[Tensor, " rank"]:
        """The gains of least loss, held near 1 by `ridge`, in units of the mean diagonal of A."""
        held = ridge * self.square.diagonal().mean()
        shifted = self.square + held * torch.eye(len(self.linear), dtype=self.square.dtype, device=self.square.device)
        found: Tensor = torch.linalg.pinv(shifted, hermitian=True) @ (self.linear + held)
        return found


def validated_gains(fitted: GainLoss, held_out: GainLoss, *, ridge: float) -> Float[Tensor, " rank"]:
    """The best gains, each only if it lowers the held-out loss given those before it; 1 elsewhere.

    Directions come in the order of what their gains change on the windows that they were fitted on, the largest first.
    """
    best = fitted.best(ridge)
    gains = torch.ones_like(best)
    changes = (best - gains).square() * fitted.square.diagonal()
    loss = held_out.at(gains)
    for direction in changes.argsort(descending=True, stable=True).tolist():
        tried = gains.clone()
        tried[direction] = best[direction]
        if (now := held_out.at(tried)) < loss:
            gains, loss = tried, now
    return gains
