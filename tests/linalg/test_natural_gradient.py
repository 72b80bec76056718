"""Directions and steps of factors, against Kronecker products, least squares, and truncated decompositions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bs_exp.linalg.cholesky import definite, solve_definite
from bs_exp.linalg.decomposition import split_by_layer
from bs_exp.linalg.natural_gradient import (
    Curvature,
    Line,
    basis_direction,
    conjugate_share,
    natural_gradient,
    vertex_of,
)
from bs_exp.types import SharedFactors, WeightGroup

GROUP = WeightGroup(matrix="up", layers=(0, 2), d_in=6, d_out=5)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(size: int, seed: int) -> Tensor:
    rows = normal(4 * size, size, seed=seed)
    return rows.mT @ rows / len(rows)


H, G = gram(6, 1), {0: gram(5, 2), 2: gram(5, 3)}
CURVATURE = Curvature(
    definite(H, ridge=0.0, of="inputs"), {layer: definite(each, ridge=0.0, of="outputs") for layer, each in G.items()}
)


def factors(rank: int) -> SharedFactors:
    return split_by_layer(GROUP, normal(rank, 6, seed=4), normal(rank, 10, seed=5))


def columns(shared: SharedFactors) -> Tensor:
    return torch.cat([shared.coefficients[layer] for layer in GROUP.layers], dim=1)


def test_a_natural_gradient_solves_the_kronecker_product() -> None:
    gradient = normal(6, 10)
    found = natural_gradient(GROUP, gradient, CURVATURE)
    for block, step, layer in zip(gradient.split(5, dim=1), found.split(5, dim=1), GROUP.layers, strict=True):
        solved = torch.linalg.solve(torch.kron(H, G[layer]), block.reshape(-1)).reshape(6, 5)
        torch.testing.assert_close(step, solved, rtol=1e-10, atol=1e-10)


def test_a_layer_that_no_loss_sees_does_not_move() -> None:
    blind = Curvature(CURVATURE.inputs, {0: CURVATURE.outputs[0]})
    gradient = normal(6, 10)
    found = natural_gradient(GROUP, gradient, blind)
    assert not found[:, 5:].any() and found[:, :5].any()
    one, both = (basis_direction(factors(3), found, each) for each in (blind, CURVATURE))
    assert bool(one.isfinite().all()) and not torch.allclose(one, both)


def test_the_basis_moves_by_weighted_least_squares() -> None:
    plain, direction = factors(3), normal(6, 10, seed=6)
    found = basis_direction(plain, direction, CURVATURE)
    roots = torch.block_diag(*(CURVATURE.outputs[layer].triangle.mT for layer in GROUP.layers))
    solved = torch.linalg.lstsq((columns(plain) @ roots).mT, (direction @ roots).mT).solution.mT
    torch.testing.assert_close(found, solved, rtol=1e-9, atol=1e-9)


def test_a_step_is_the_best_approximation_of_its_rank_to_first_order() -> None:
    """Oracle: the truncated decomposition in the metric, for one layer; errors are of second order in the length."""
    group = WeightGroup(matrix="up", layers=(0,), d_in=6, d_out=5)
    curvature = Curvature(CURVATURE.inputs, {0: CURVATURE.outputs[0]})
    plain = split_by_layer(group, normal(2, 6, seed=4), normal(2, 5, seed=5))
    product, direction = plain.basis @ plain.coefficients[0], normal(6, 5, seed=6)
    errors = []
    for length in (1e-3, 1e-4):
        moved = Line.through(plain, direction, basis_direction(plain, direction, curvature), curvature.inputs).at(
            length, plain
        )
        root, outer = curvature.inputs.triangle, curvature.outputs[0].triangle
        whitened = root @ (product - length * direction) @ outer.mT
        left, sizes, right = torch.linalg.svd(whitened, full_matrices=False)
        best = torch.linalg.solve(root, left[:, :2] * sizes[:2]) @ right[:2]
        best = torch.linalg.solve(outer, best.mT).mT
        errors.append(float(torch.linalg.matrix_norm(moved.basis @ moved.coefficients[0] - best)))
    assert errors[0] < 1e-4
    assert errors[1] < errors[0] / 50.0


@pytest.mark.parametrize("rank", [3, 6])
def test_lengths_of_nothing_and_full_ranks_are_exact(rank: int) -> None:
    plain, direction = factors(rank), normal(6, 10, seed=6)
    basis = basis_direction(plain, direction, CURVATURE)
    line = Line.through(plain, direction, basis, CURVATURE.inputs)
    still = line.at(0.0, plain)
    torch.testing.assert_close(still.basis @ columns(still), plain.basis @ columns(plain), rtol=1e-9, atol=1e-9)
    if rank == 6:
        moved = line.at(0.01, plain)
        expected = plain.basis @ columns(plain) - 0.01 * direction
        torch.testing.assert_close(moved.basis @ columns(moved), expected, rtol=1e-8, atol=1e-8)


def test_the_coefficients_there_are_least_squares_for_the_basis_there() -> None:
    plain, direction, length = factors(3), normal(6, 10, seed=6), 0.3
    basis_step = basis_direction(plain, direction, CURVATURE)
    found = Line.through(plain, direction, basis_step, CURVATURE.inputs).at(length, plain)
    root, basis = CURVATURE.inputs.triangle, plain.basis - length * basis_step
    wanted = plain.basis @ columns(plain) - length * direction
    solved = basis @ torch.linalg.lstsq(root @ basis, root @ wanted).solution
    torch.testing.assert_close(found.basis @ columns(found), solved, rtol=1e-9, atol=1e-9)


def test_shares_are_those_of_conjugate_gradients() -> None:
    assert conjugate_share(4.0, 1.0, None) == 0.0
    assert conjugate_share(4.0, 1.0, 2.0) == 1.5
    assert conjugate_share(1.0, 4.0, 2.0) == 0.0
    assert conjugate_share(1.0, 1.0, 0.0) == 0.0


def test_definite_systems_are_solved_whatever_their_rank_and_scale() -> None:
    matrix, right = gram(6, 7), normal(6, 3)
    scale = torch.tensor([1e-8, 1.0, 1e8, 1.0, 1.0, 1.0], dtype=torch.float64)
    scaled = scale[:, None] * matrix * scale
    solved = torch.linalg.solve(matrix, right / scale[:, None]) / scale[:, None]
    torch.testing.assert_close(solve_definite(scaled, right), solved, rtol=1e-8, atol=0.0)
    low = normal(6, 2)
    flat = low @ low.mT
    torch.testing.assert_close(flat @ solve_definite(flat, flat @ right), flat @ right, rtol=1e-8, atol=1e-8)
    assert not solve_definite(torch.zeros(6, 6, dtype=torch.float64), right).any()


def test_the_vertex_of_a_parabola_is_found_from_any_three_of_its_points() -> None:
    values = {length: 3.0 * (length - 0.7) ** 2 + 0.1 for length in (0.0, 0.5, 0.6, 2.0, 5.0)}
    for left, middle, right in ((0.0, 0.5, 2.0), (0.0, 0.6, 5.0), (0.5, 2.0, 5.0)):
        assert vertex_of(values, left, middle, right) == pytest.approx(0.7)


@pytest.mark.parametrize("last", [float("inf"), 0.0, -1.0], ids=["infinite", "straight", "falling faster"])
def test_without_a_vertex_the_middle_stays(last: float) -> None:
    assert vertex_of({0.0: 2.0, 1.0: 1.0, 2.0: last}, 0.0, 1.0, 2.0) == 1.0


@pytest.mark.parametrize("ridge", [0.0, 1e-20, 0.01])
def test_a_definite_gram_is_that_of_its_root_whatever_its_rank(ridge: float) -> None:
    low = normal(6, 2)
    found = definite(low @ low.mT, ridge=ridge, of="inputs")
    torch.testing.assert_close(found.times(torch.eye(6).double()), found.triangle.mT @ found.triangle)
