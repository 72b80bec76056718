"""Factors without the identity that one of them can be made to hold, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bs_exp.types import SharedFactors, WeightGroup

# Pivots that need larger combinations of themselves are chosen anew; those that QR chooses seldom need any above 4.
_LARGE = 10.0


@dataclass(frozen=True, eq=False)
class PivotedForm:
    """The product of a group's factors in fp64, with k of its features as `pivots`.

    Pivots among the outputs (a single matrix): the basis `[d_in, k]` consists of these columns of the product, and the
    coefficients `[k, d_out - k]` make the others of it. Pivots among the inputs (a shared basis): the coefficients
    `[k, d_out]` of a layer are these rows of its product, and the basis `[d_in - k, k]` makes the others of them.
    """

    basis: Float[Tensor, "inputs rank"]
    coefficients: Mapping[int, Float[Tensor, "rank outputs"]]
    pivots: Bool[Tensor, " features"]


def pivots_are_inputs(group: WeightGroup) -> bool:
    """Whether a group has its pivots among the inputs: where the basis is shared, since every layer computes with it.

    `pivoted_kind` of the shipped file, which imports nothing of this package, decides the same for its layers.
    """
    return group.size > 1


def pivoted_form(factors: SharedFactors, pivots: Bool[Tensor, " features"] | None = None) -> PivotedForm:
    """Factors of the same product, in fp64, one of which holds a k x k identity that is left out.

    A single matrix uses k independent columns J of C (outputs), `B C = (B C_J)(C_J^-1 C)`. A shared basis uses k
    independent rows J of B (inputs), `B C = (B B_J^-1)(B_J C)`, since every layer computes with it. J is chosen by QR
    with column pivoting, so that the stored numbers stay small and well conditioned; or it is those `pivots` again, for
    which they do: that takes a quarter of the time.
    """
    group, basis = factors.group, factors.basis.double()
    coefficients = {layer: c.double() for layer, c in factors.coefficients.items()}
    inputs = pivots_are_inputs(group)
    matrix = basis.mT if inputs else coefficients[group.layers[0]]
    others = None if pivots is None else _combinations(matrix, pivots)
    if pivots is None or others is None:
        if inputs:
            whole = torch.cat([coefficients[layer] for layer in group.layers], dim=1)
            # Rows with the norms and angles of the product's rows: inputs are chosen by their effect on the outputs.
            matrix = (basis @ torch.linalg.qr(whole.mT, mode="r").R.mT).mT
        pivots, others = _interpolation(matrix)
    if inputs:
        return PivotedForm(others.mT, {layer: basis[pivots] @ c for layer, c in coefficients.items()}, pivots)
    (layer,) = group.layers
    return PivotedForm(basis @ coefficients[layer][:, pivots], {layer: others}, pivots)


def plain_form(group: WeightGroup, pivoted: PivotedForm) -> SharedFactors:
    """Factors `[d_in, k]` and `[k, d_out]` of the same product in fp64, with the identity in one of them."""
    basis, pivots = pivoted.basis.double(), pivoted.pivots.to(pivoted.basis.device)
    coefficients = {layer: c.double() for layer, c in pivoted.coefficients.items()}
    if pivots_are_inputs(group):
        return SharedFactors(group, _with_identity(basis.mT, pivots).mT, coefficients)
    return SharedFactors(group, basis, {layer: _with_identity(c, pivots) for layer, c in coefficients.items()})


def _combinations(matrix: Float[Tensor, "k n"], pivots: Bool[Tensor, " n"]) -> Float[Tensor, "k others"] | None:
    """The combinations `M_J^-1 M` of the columns `pivots` that give the others; None if some are large."""
    found, info = torch.linalg.solve_ex(matrix[:, pivots], matrix[:, ~pivots])
    small = int(info) == 0 and bool((found.abs() <= _LARGE).all())  # what is not finite is not small
    return found if small else None


# An operation of PyTorch's, so that shapes can go through it where there are no values.
@torch.library.custom_op("bs_exp::interpolation", mutates_args=())
def _interpolation(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """k columns J of a matrix [k, n], one bit for each of n, and the combinations `M_J^-1 M` [k, n - k] of them that
    give its other columns.

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


@_interpolation.register_fake
def _(matrix: Tensor) -> tuple[Tensor, Tensor]:
    rank, width = matrix.shape
    return matrix.new_empty(width, dtype=torch.bool), matrix.new_empty(rank, width - rank)


def _with_identity(others: Float[Tensor, "k others"], own: Bool[Tensor, " n"]) -> Float[Tensor, "k n"]:
    """The full matrix: the identity in the columns `own`, and `others` in the remaining columns."""
    whole = others.new_zeros(others.shape[0], len(own))
    whole[:, own] = torch.eye(others.shape[0], dtype=others.dtype, device=others.device)
    whole[:, ~own] = others
    return whole
