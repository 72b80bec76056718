"""The truncation towards dense outputs is AA-SVD's objective: a reduced-rank regression on the tokens themselves."""

from __future__ import annotations

import pytest
import torch

from bs_exp.linalg.anchoring import anchored_factors
from bs_exp.linalg.least_squares import InputPairs
from bs_exp.types import WeightGroup
from tests.support.regression import reduced_rank


@pytest.mark.parametrize(("d_in", "d_out"), [(8, 12), (12, 8)])
@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_no_factors_of_the_rank_give_the_dense_outputs_better(d_in: int, d_out: int, drift: float) -> None:
    random = torch.Generator().manual_seed(0)
    dense, noise = (torch.randn(200, d_in, generator=random, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(d_in, d_out, generator=random, dtype=torch.float64)
    compressed = dense @ torch.linspace(0.2, 2.0, d_in).double().diag() + drift * noise
    group = WeightGroup(matrix="up", layers=(0,), d_in=d_in, d_out=d_out)
    for rank in (1, 3, 8):
        found = anchored_factors(group, weight, InputPairs.of(compressed, dense), rank, ridge=0.0)
        expected = reduced_rank(compressed, dense @ weight, rank)
        torch.testing.assert_close(found.basis @ found.coefficients[0], expected, rtol=1e-8, atol=1e-8)


def test_where_nothing_is_read_the_weight_stays() -> None:
    """Inputs of rank 2 out of 6: a ridge keeps what they leave open near the dense weight."""
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 2, generator=random, dtype=torch.float64) @ torch.eye(2, 6, dtype=torch.float64)
    weight = torch.randn(6, 6, generator=random, dtype=torch.float64)
    group = WeightGroup(matrix="up", layers=(0,), d_in=6, d_out=6)
    pairs = InputPairs.of(inputs, 1.1 * inputs)
    found = anchored_factors(group, weight, pairs, 6, ridge=1e-8)
    expected = torch.cat((1.1 * weight[:2], weight[2:]))
    torch.testing.assert_close(found.basis @ found.coefficients[0], expected, rtol=1e-6, atol=1e-6)
