"""SOAP, an optimiser for matrices: Adam in the eigenbases of their gradients' covariances."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

# In units of the dtype's precision. Rotated gradients below this share of the largest one are rounding errors of the
# rotation, in directions without any gradient: they must not become steps.
_ROUNDING = 100.0


class Soap(torch.optim.Optimizer):
    """SOAP (Vyas et al., 2409.11321, algorithm 3), with decoupled weight decay, for parameters that are matrices.

    Running means of `G G^T` and `G^T G` over the gradients `G` give an orthogonal basis for either side of a matrix,
    close to their eigenvectors; Adam's second moments are kept in these bases. The first gradient only makes the bases.
    Every `precondition_frequency` steps, each basis takes one power iteration and a QR decomposition.
    Sides longer than `max_precond_dim` are not rotated; if neither side is, this is Adam.

    SOAP fits the factors of a compressed matrix, as the curvature of a factor is close to a Kronecker product of Grams
    of its inputs and outputs (the two sides of `whitening=two_sided`). Memory per rotated side of length d: two fp32
    matrices of `d x d`. Every step multiplies by both bases.
    """

    # Of each parameter; sides that are not rotated have empty tensors.
    STATE = ("step", "exp_avg", "exp_avg_sq", "left", "right", "left_basis", "right_basis")

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float],
        weight_decay: float = 0.0,
        precondition_frequency: int,
        max_precond_dim: int,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "max_precond_dim": max_precond_dim,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (slow, fast) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state |= {name: parameter.new_empty(0) for name in self.STATE if name not in state}
            if min(gradient.shape) <= group["max_precond_dim"]:
                # In its own basis, a gradient is diagonal up to rounding errors, which would become steps.
                self._precondition(state, gradient, fast, due=False, limit=group["max_precond_dim"])
                return
        state["step"] += 1
        count = int(state["step"])
        rotated = _rotate(gradient, state)
        state["exp_avg"].lerp_(gradient, 1.0 - slow)
        state["exp_avg_sq"].lerp_(rotated.square(), 1.0 - fast)
        mean = _rotate(state["exp_avg"], state) / (1.0 - slow**count)
        spread = (state["exp_avg_sq"] / (1.0 - fast**count)).sqrt()
        limits = torch.finfo(spread.dtype)
        update = mean / (spread + _ROUNDING * limits.eps * spread.amax() + limits.tiny)
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.add_(_rotate(update, state, back=True), alpha=-group["lr"])
        due = count % group["precondition_frequency"] == 0
        self._precondition(state, gradient, fast, due=due, limit=group["max_precond_dim"])

    @staticmethod
    def _precondition(state: dict[str, Tensor], gradient: Tensor, decay: float, *, due: bool, limit: int) -> None:
        """Adds a gradient to the running covariance of each side up to `limit` long; updates the bases if `due`."""
        for side, dim in (("left", 0), ("right", 1)):
            if gradient.shape[dim] > limit:
                continue
            covariance = gradient @ gradient.mT if dim == 0 else gradient.mT @ gradient
            if not state[side].numel():
                state[side] = covariance
                state[f"{side}_basis"] = torch.linalg.eigh(covariance).eigenvectors.contiguous()
                continue
            state[side].lerp_(covariance, 1.0 - decay)
            if due:
                state[f"{side}_basis"], order = power_iteration(state[side], state[f"{side}_basis"])
                # The second moments are reordered with their directions.
                state["exp_avg_sq"] = state["exp_avg_sq"].index_select(dim, order)


def power_iteration(
    covariance: Float[Tensor, "d d"], basis: Float[Tensor, "d d"]
) -> tuple[Float[Tensor, "d d"], Int[Tensor, " d"]]:
    """A basis one power iteration closer to the covariance's eigenvectors, and the order of the old columns in it.

    Columns are ordered by their estimated eigenvalues, the largest first; QR makes them orthonormal (2409.11321,
    algorithm 4).
    """
    order = ((covariance @ basis) * basis).sum(0).argsort(descending=True)
    return torch.linalg.qr(covariance @ basis[:, order]).Q.contiguous(), order


def _rotate(matrix: Tensor, state: dict[str, Tensor], *, back: bool = False) -> Tensor:
    """A matrix in the bases of its two sides, or (`back`) a matrix given in these bases in the original ones."""
    left, right = state["left_basis"], state["right_basis"]
    if left.numel():
        matrix = (left if back else left.mT) @ matrix
    if right.numel():
        matrix = matrix @ (right.mT if back else right)
    return matrix
