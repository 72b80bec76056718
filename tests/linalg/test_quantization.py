"""Grids and rounding: formulae, exactness, and error feedback against a plain solver and all codes there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bs_exp.errors import DecompositionError
from bs_exp.linalg.quantization import Grid, fit_grid, output_loss, round_with_feedback

FULL = (1.0,)  # the whole range: round-to-nearest as everybody has it


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(columns: int, *, seed: int = 0, tokens: int = 200) -> Tensor:
    """The Gram of inputs that depend on each other."""
    inputs = normal(tokens, columns, seed=seed) @ normal(columns, columns, seed=seed + 1)
    return inputs.mT @ inputs


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_symmetric_scales_reach_the_largest_weight(bits: int) -> None:
    weight = normal(5, 7)
    grid = fit_grid(weight, bits=bits, group_size=None, symmetric=True, dtype=torch.float64, shrinks=FULL)
    assert grid.zero is None
    torch.testing.assert_close(grid.scale[:, 0], weight.abs().amax(dim=1) / (2 ** (bits - 1) - 1))
    assert bool(((grid.values(grid.codes(weight)) - weight).abs() <= grid.scale / 2 * (1 + 1e-12)).all())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_asymmetric_grids_span_the_range_and_hold_zero(bits: int) -> None:
    weight = normal(5, 7).abs() + 0.25  # 0 lies outside of the weights' range
    grid = fit_grid(weight, bits=bits, group_size=None, symmetric=False, dtype=torch.float64, shrinks=FULL)
    torch.testing.assert_close(grid.scale[:, 0], weight.amax(dim=1) / (2**bits - 1))
    assert grid.zero is not None and grid.zero.dtype is torch.uint8 and bool((grid.zero == 0).all())
    mixed = normal(5, 7)
    grid = fit_grid(mixed, bits=bits, group_size=None, symmetric=False, dtype=torch.float64, shrinks=FULL)
    low, high = mixed.amin(dim=1), mixed.amax(dim=1)
    torch.testing.assert_close(grid.scale[:, 0], (high - low) / (2**bits - 1))
    assert grid.zero is not None
    torch.testing.assert_close(grid.zero[:, 0].double(), (-low / grid.scale[:, 0]).round())
    zeros = torch.zeros(5, 7, dtype=torch.float64)
    assert torch.equal(grid.values(grid.codes(zeros)), zeros)


def test_groups_have_grids_of_their_own_and_the_last_may_be_smaller() -> None:
    weight = normal(3, 10) * torch.tensor([1.0] * 4 + [100.0] * 4 + [0.01] * 2)
    grid = fit_grid(weight, bits=4, group_size=4, symmetric=True, dtype=torch.float64, shrinks=FULL)
    parts = [
        fit_grid(part, bits=4, group_size=None, symmetric=True, dtype=torch.float64, shrinks=FULL)
        for part in weight.split(4, dim=1)
    ]
    assert torch.equal(grid.scale, torch.cat([part.scale for part in parts], dim=1))
    whole = torch.cat([part.codes(w) for part, w in zip(parts, weight.split(4, dim=1), strict=True)], dim=1)
    assert torch.equal(grid.codes(weight), whole)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("feedback", [True, False])
def test_what_the_grid_holds_is_kept_exactly(symmetric: bool, feedback: bool) -> None:
    codes = torch.randint(-7, 8, (6, 9), generator=torch.Generator().manual_seed(0)).double()
    codes[:, 0], codes[:, 1] = 7.0, -7.0 if symmetric else -8.0
    weight = codes * 2.0 ** torch.arange(-3, 3)[:, None].double()
    grid = fit_grid(weight, bits=4, group_size=None, symmetric=symmetric, dtype=torch.bfloat16)
    gram = correlated(9)
    found = (
        round_with_feedback(weight, grid, gram, damping=0.01, by_importance=True) if feedback else grid.codes(weight)
    )
    assert torch.equal(grid.values(found), weight)
    assert output_loss(weight, grid.values(found), gram) == 0.0


def test_values_are_rounded_as_a_model_of_that_dtype_computes_them() -> None:
    weight = normal(4, 6)
    grid = fit_grid(weight, bits=8, group_size=None, symmetric=True, dtype=torch.bfloat16)
    codes = grid.codes(weight)
    assert grid.scale.dtype is torch.bfloat16
    assert torch.equal(grid.values(codes), ((codes.bfloat16() - 128) * grid.scale).double())


def test_a_narrower_grid_is_taken_where_it_costs_less() -> None:
    """One outlier among many equal weights; not where the outlier is what the inputs reach."""
    weight = torch.cat([normal(1, 400), torch.tensor([[12.0]], dtype=torch.float64)], dim=1)
    wide = fit_grid(weight, bits=3, group_size=None, symmetric=True, dtype=torch.float64, shrinks=FULL)
    fitted = fit_grid(weight, bits=3, group_size=None, symmetric=True, dtype=torch.float64)
    assert float(fitted.scale) < float(wide.scale)
    error = [float((g.values(g.codes(weight)) - weight).square().sum()) for g in (fitted, wide)]
    assert error[0] < error[1]
    loud = torch.ones(401, dtype=torch.float64)
    loud[-1] = 1e6
    kept = fit_grid(weight, bits=3, group_size=None, symmetric=True, dtype=torch.float64, importance=loud)
    assert abs(float(kept.values(kept.codes(weight))[0, -1]) - 12.0) < 0.1


@pytest.mark.parametrize("by_importance", [True, False])
def test_feedback_is_the_least_squares_solution_at_every_column(by_importance: bool) -> None:
    """Oracle: after each rounding, the free columns are set to those of least loss, by a solver that knows no root."""
    weight, gram = normal(4, 9), correlated(9)
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    grid = fit_grid(weight, bits=3, group_size=4, symmetric=False, dtype=torch.float64)
    order = torch.argsort(gram.diagonal(), descending=True) if by_importance else torch.arange(9)
    left, expected = weight.clone(), torch.empty(4, 9, dtype=torch.uint8)
    for step in range(9):
        column = int(order[step])
        expected[:, column] = grid.codes(left)[:, column]
        fixed, free = order[: step + 1], order[step + 1 :]
        error = grid.values(expected)[:, fixed] - weight[:, fixed]
        left[:, free] = weight[:, free] - torch.linalg.solve(gram[free][:, free], gram[free][:, fixed] @ error.mT).mT
    found = round_with_feedback(weight, grid, gram, damping=0.0, by_importance=by_importance)
    assert torch.equal(found, expected)


def test_blocks_of_columns_change_nothing() -> None:
    """More columns than one block holds: the same as an unblocked pass, which is how the first block begins."""
    weight, gram = normal(2, 300), correlated(300, tokens=900)
    grid = fit_grid(weight, bits=4, group_size=None, symmetric=True, dtype=torch.float64)
    found = round_with_feedback(weight, grid, gram, damping=0.01, by_importance=False)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(300, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left = weight.clone()
    for i in range(300):
        error = (left[:, i] - grid.values(grid.codes(left))[:, i]) / upper[i, i]
        assert torch.equal(grid.codes(left)[:, i], found[:, i]), i
        left[:, i + 1 :] -= torch.outer(error, upper[i, i + 1 :])


@pytest.mark.parametrize("seed", range(5))
def test_between_the_best_of_all_codes_and_round_to_nearest(seed: int) -> None:
    weight, gram = normal(3, 5, seed=seed), correlated(5, seed=10 + seed)
    grid = fit_grid(weight, bits=2, group_size=None, symmetric=True, dtype=torch.float64, shrinks=FULL)
    every = torch.tensor(list(itertools.product(range(4), repeat=5)), dtype=torch.uint8)
    best = 0.0
    for row in range(3):
        one = Grid(2, 5, None, grid.scale[row : row + 1].expand(len(every), 1), None)
        errors = one.values(every) - weight[row]
        best += float((errors * (errors @ gram)).sum(dim=1).min())
    nearest = output_loss(weight, grid.values(grid.codes(weight)), gram)
    codes = round_with_feedback(weight, grid, gram, damping=1e-6, by_importance=True)
    assert best * (1 - 1e-9) <= output_loss(weight, grid.values(codes), gram) <= nearest


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(8, None, True), (4, 16, False), (3, 16, True)])
def test_feedback_takes_at_least_a_third_of_the_loss(bits: int, group_size: int | None, symmetric: bool) -> None:
    weight, gram = normal(24, 40), correlated(40)
    grid = fit_grid(
        weight,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        dtype=torch.float32,
        importance=gram.diagonal(),
    )
    codes = round_with_feedback(weight, grid, gram, damping=0.01, by_importance=True)
    loss, nearest = (output_loss(weight, grid.values(c), gram) for c in (codes, grid.codes(weight)))
    assert 0.0 < loss < 0.67 * nearest


def test_inputs_that_do_not_depend_on_each_other_leave_nothing_to_feed_back() -> None:
    weight = normal(4, 6)
    grid = fit_grid(weight, bits=4, group_size=None, symmetric=True, dtype=torch.float64)
    for gram in (torch.diag(torch.arange(1.0, 7.0).double()), torch.zeros(6, 6)):
        found = round_with_feedback(weight, grid, gram, damping=0.01, by_importance=True)
        assert torch.equal(found, grid.codes(weight))


def test_dead_channels_and_a_singular_gram_are_no_obstacle() -> None:
    weight, gram = normal(4, 8), correlated(8, tokens=3)
    gram[2], gram[:, 2] = 0.0, 0.0
    weight[1], weight[:, 5] = 0.0, 0.0
    grid = fit_grid(weight, bits=4, group_size=None, symmetric=True, dtype=torch.float16, importance=gram.diagonal())
    codes = round_with_feedback(weight, grid, gram, damping=0.0, by_importance=True)
    assert bool(grid.values(codes).isfinite().all()) and not grid.values(codes)[1].any()
    tiny = fit_grid(weight * 1e-9, bits=8, group_size=None, symmetric=True, dtype=torch.float16)
    assert bool((tiny.scale > 0).all()) and bool(tiny.values(tiny.codes(weight * 1e-9)).isfinite().all())


def test_what_is_not_finite_is_refused() -> None:
    weight = normal(2, 3)
    grid = fit_grid(weight, bits=4, group_size=None, symmetric=True, dtype=torch.float64)
    with pytest.raises(DecompositionError, match="not finite"):
        round_with_feedback(weight, grid, torch.full((3, 3), torch.nan), damping=0.01, by_importance=True)
    weight[0, 0] = torch.inf
    with pytest.raises(DecompositionError, match="NaN or infinite"):
        fit_grid(weight, bits=4, group_size=None, symmetric=True, dtype=torch.float64)
