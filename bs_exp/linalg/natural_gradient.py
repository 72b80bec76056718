"""Steps of a group's factors against the natural gradient of the loss, whose curvature is a Kronecker product."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.errors import DecompositionError
from bs_exp.linalg.cholesky import solve_definite
from bs_exp.linalg.decomposition import split_by_layer
from bs_exp.linalg.scaling import balanced
from bs_exp.types import GramRoot, SharedFactors, WeightGroup


@dataclass(frozen=True, eq=False)
class Curvature:
    """The curvature of the loss by the weights of a group, `H (x) G_i` for layer i: both factors, damped.

    A layer of which no output reaches the loss has no `G_i`. Only the natural gradient needs their roots. Kronecker
    factors: Martens and Grosse (1503.05671), section 3.
    """

    inputs: GramRoot
    outputs: Mapping[int, GramRoot]


def natural_gradient(
    group: WeightGroup, gradient: Float[Tensor, "d_in columns"], curvature: Curvature
) -> Float[Tensor, "d_in columns"]:
    """`H^-1 D_i G_i^-1` for every layer's block `D_i` of the gradient; zero for a layer without curvature."""
    by_inputs = torch.cholesky_solve(gradient, curvature.inputs.triangle, upper=True)
    found = []
    for layer, block in zip(group.layers, by_inputs.split(group.d_out, dim=1), strict=True):
        gram = curvature.outputs.get(layer)
        solved = None if gram is None else torch.cholesky_solve(block.mT, gram.triangle, upper=True).mT
        found.append(torch.zeros_like(block) if solved is None else solved)
    return torch.cat(found, dim=1)


def conjugate_share(product: float, crossed: float, before: float | None) -> float:
    """The share of the direction before in the next one: Polak and Ribiere's, at least 0; 0 for the first step.

    `product` is `<D, n>`, of gradient and natural gradient, `crossed` `<D', n>` with the gradient before, and `before`
    `<D', n'>`.
    """
    return max(0.0, (product - crossed) / before) if before else 0.0


def vertex_of(values: Mapping[float, float], left: float, middle: float, right: float) -> float:
    """Where the parabola through three of the values is least; `middle` where it has no such place, or not finite ones.

    With the least value in the middle it is between the outer places.
    """
    before, after = (
        (values[middle] - values[left]) / (middle - left),
        (values[right] - values[middle]) / (right - middle),
    )
    curvature = (after - before) / (right - left)
    if not math.isfinite(curvature) or curvature <= 0.0:
        return middle
    return (left + middle) / 2.0 - before / (2.0 * curvature)


def basis_direction(
    factors: SharedFactors, direction: Float[Tensor, "d_in columns"], curvature: Curvature
) -> Float[Tensor, "d_in rank"]:
    """`sum_i d_i G_i C_i^T (sum_i C_i G_i C_i^T)^-1`: the basis of the least error `sum_i ||S (d_i - B' C_i) R_i^T||`.

    It is what a shared basis, with coefficients `C_i` as they are, can do for a `direction` `[d_1 .. d_n]`.
    """
    group = factors.group
    reached = direction.new_zeros(group.d_in, factors.rank)
    among = direction.new_zeros(factors.rank, factors.rank)
    for layer, block in zip(group.layers, direction.split(group.d_out, dim=1), strict=True):
        gram = curvature.outputs.get(layer)
        if gram is not None:
            weighted = gram.times(factors.coefficients[layer].mT)
            reached += block @ weighted
            among += factors.coefficients[layer] @ weighted
    return solve_definite(among, reached.mT).mT


@dataclass(frozen=True, eq=False)
class Line:
    """Factors of one rank for `B C - t * direction`, whatever the length t, without a decomposition.

    The basis moves by `basis_step`, then the coefficients are those of the least error in the metric H of the inputs:
    one half-step each of alternating least squares from the present factors, which to first order in t is the best
    approximation of this rank. Both sides of the normal equations, `B_t^T H B_t C_t = B_t^T H (B C - t * direction)`
    with `B_t = B - t * basis_step`, are polynomials in t. Divided by those at t = 0, they are
    `(1 + t A_1 + t^2 A_2)(C_t - C) = t V_1 + t^2 V_2`: `among` holds the A, `moved` the V.
    """

    basis_step: Float[Tensor, "d_in rank"]
    among: Float[Tensor, "2 rank rank"]
    moved: Float[Tensor, "2 rank columns"]

    @classmethod
    def through(
        cls,
        factors: SharedFactors,
        direction: Float[Tensor, "d_in columns"],
        basis_step: Float[Tensor, "d_in rank"],
        inputs: GramRoot,
    ) -> Line:
        """The line from these factors on; `inputs` is the metric H."""
        rank = factors.rank
        basis, step = inputs.times(factors.basis).mT, inputs.times(basis_step).mT
        mixed = step @ factors.basis
        first, second = -(mixed + mixed.mT), step @ basis_step
        # The right sides less the left ones at C; at first order `-mixed C` is on both.
        wanted = [mixed.mT @ _columns(factors) - basis @ direction, step @ direction - second @ _columns(factors)]
        solved = solve_definite(basis @ factors.basis, torch.cat([first, second, *wanted], dim=1))
        among, moved = solved.split([2 * rank, solved.shape[1] - 2 * rank], dim=1)
        return cls(basis_step, *(torch.stack(both.chunk(2, dim=1)) for both in (among, moved)))

    def at(self, length: float, factors: SharedFactors) -> SharedFactors:
        """The factors there, from those where the line begins; corrections stay as they are.

        DecompositionError where they would not be finite.
        """
        among = torch.eye(factors.rank).to(self.among) + length * (self.among[0] + length * self.among[1])
        moved, info = torch.linalg.solve_ex(among, length * (self.moved[0] + length * self.moved[1]))
        if int(info) != 0 or not bool(moved.isfinite().all()):
            raise DecompositionError(f"The factors of group {factors.group.name} are not finite at length {length:g}.")
        basis = factors.basis - length * self.basis_step
        found = split_by_layer(factors.group, *balanced(basis.mT, _columns(factors) + moved))
        return SharedFactors(factors.group, found.basis, found.coefficients, factors.corrections)


def _columns(factors: SharedFactors) -> Float[Tensor, "rank columns"]:
    return torch.cat([factors.coefficients[layer] for layer in factors.group.layers], dim=1)
