"""The pivoted form has the same products, without the identity, and gives the factors back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bs_exp.linalg.pivoting import PivotedForm, pivoted_form, pivots_are_inputs, plain_form
from bs_exp.types import SharedFactors, WeightGroup


def factors(d_in: int, d_out: int, size: int, rank: int, seed: int = 0) -> SharedFactors:
    generator = torch.Generator().manual_seed(seed)
    group = WeightGroup("q", tuple(range(size)), d_in, d_out)
    basis = torch.randn(d_in, rank, generator=generator, dtype=torch.float64)
    coefficients = {i: torch.randn(rank, d_out, generator=generator, dtype=torch.float64) for i in group.layers}
    return SharedFactors(group, basis, coefficients)


@settings(max_examples=50, deadline=None)
@given(
    d_in=st.integers(2, 12), d_out=st.integers(1, 9), size=st.integers(1, 4), rank=st.integers(1, 12),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_product_is_the_same_and_the_identity_is_gone(
    d_in: int, d_out: int, size: int, rank: int, seed: int
) -> None:
    rank = min(rank, d_in, size * d_out)
    plain = factors(d_in, d_out, size, rank, seed)
    pivoted = pivoted_form(plain)
    own = pivoted.pivots
    assert int(own.sum()) == rank and len(own) == (d_out if size == 1 else d_in)
    assert pivots_are_inputs(plain.group) == (size > 1)
    for layer in plain.group.layers:
        product = torch.empty(d_in, d_out, dtype=torch.float64)
        if size == 1:
            product[:, own] = pivoted.basis
            product[:, ~own] = pivoted.basis @ pivoted.coefficients[layer]
        else:
            product[own] = pivoted.coefficients[layer]
            product[~own] = pivoted.basis @ pivoted.coefficients[layer]
        torch.testing.assert_close(product, plain.basis @ plain.coefficients[layer], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [1, 2])
def test_no_pivot_is_far_from_the_best(size: int) -> None:
    """Oracle: exchanging a pivot with another feature changes the volume by the entry that is stored for the two."""
    pivoted = pivoted_form(factors(60, 60, size, 30))
    others = pivoted.coefficients[0] if size == 1 else pivoted.basis
    assert float(others.abs().max()) < 3.0


def test_which_pivots_does_not_depend_on_how_the_product_is_written() -> None:
    plain = factors(20, 9, 2, 7)
    change = torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    changed = replace(
        plain,
        basis=plain.basis @ change,
        coefficients={layer: torch.linalg.solve(change, c) for layer, c in plain.coefficients.items()},
    )
    first, second = pivoted_form(plain), pivoted_form(changed)
    assert torch.equal(first.pivots, second.pivots)
    torch.testing.assert_close(first.basis, second.basis)


def _products(form: PivotedForm, group: WeightGroup) -> torch.Tensor:
    plain = plain_form(group, form)
    return torch.cat([plain.basis @ plain.coefficients[layer] for layer in group.layers], dim=1)


@pytest.mark.parametrize("size", [1, 2])
def test_pivots_of_close_factors_serve_again(size: int) -> None:
    plain, other = factors(20, 18, size, 7), factors(20, 18, size, 7, seed=1)
    pivots = pivoted_form(plain).pivots
    moved = replace(
        plain,
        basis=plain.basis + 0.01 * other.basis,
        coefficients={layer: c + 0.01 * other.coefficients[layer] for layer, c in plain.coefficients.items()},
    )
    again = pivoted_form(moved, pivots)
    assert torch.equal(again.pivots, pivots)
    torch.testing.assert_close(_products(again, plain.group), _products(pivoted_form(moved), plain.group))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("scale", [0.0, 1e-3], ids=["dependent", "nearly"])
def test_pivots_that_do_no_longer_serve_are_chosen_anew(size: int, scale: float) -> None:
    """One of the pivots becomes (nearly) a multiple of another."""
    plain = factors(20, 18, size, 7)
    pivots = pivoted_form(plain).pivots
    first, second = pivots.nonzero()[:2, 0]
    matrix = plain.basis.T if size > 1 else plain.coefficients[0]
    matrix[:, second] = matrix[:, first] + scale * matrix[:, second]
    again, anew = pivoted_form(plain, pivots), pivoted_form(plain)
    assert torch.equal(again.pivots, anew.pivots) and not torch.equal(again.pivots, pivots)
    assert torch.equal(again.basis, anew.basis)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("independent", [0, 1, 3])
def test_products_of_lower_rank(independent: int, size: int) -> None:
    """Such as a matrix of zeros, with which blocks are added to a trained model."""
    plain = factors(6, 5, size, 4)
    whole = {layer: c * (torch.arange(4) < independent)[:, None] for layer, c in plain.coefficients.items()}
    pivoted = pivoted_form(replace(plain, coefficients=whole))
    again = plain_form(plain.group, pivoted)
    for layer, coefficients in whole.items():
        torch.testing.assert_close(again.basis @ again.coefficients[layer], plain.basis @ coefficients)
