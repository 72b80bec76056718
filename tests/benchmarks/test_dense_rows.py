"""Rows kept dense: what the rest cannot make up for is found exactly, and the table is there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bs_exp.benchmarks.dense_rows import gain, main
from bs_exp.layout.plain import PlainLayout


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_row_of_its_own_and_a_rest_of_rank_two() -> None:
    """Inputs are correlated, so the rest is of rank two only in what the kept row leaves of it."""
    inputs = gaussian(200, 12, seed=0)
    weight = gaussian(12, 2, seed=1) @ gaussian(2, 10, seed=2)
    weight[3] = 0.3 * gaussian(1, 10, seed=3)[0]
    budget = (10 + 2 * (11 + 10)) / weight.numel()
    found = gain(weight, inputs.mT @ inputs, budget + 1e-6, PlainLayout())
    assert found.rows == 1 and found.with_rows < 1e-8 < 1e-3 < found.without


def test_the_error_is_that_of_what_the_kept_inputs_leave() -> None:
    """Oracle: the inputs themselves, without the space of the kept channel, times the rest of the weight."""
    inputs = gaussian(100, 6, seed=0)
    weight = 30.0 * gaussian(6, 1, seed=1) @ gaussian(1, 40, seed=2) + 0.1 * gaussian(6, 40, seed=3)
    weight[3] += gaussian(1, 40, seed=4)[0]
    found = gain(weight, inputs.mT @ inputs, 88 / 240, PlainLayout())  # 88 parameters: a row, and rank 1 of 5 x 40
    rest = [0, 1, 2, 4, 5]
    kept = torch.linalg.qr(inputs[:, [3]]).Q
    left = (inputs[:, rest] - kept @ (kept.mT @ inputs[:, rest])) @ weight[rest]
    energy = torch.linalg.svdvals(left)[1:].square().sum() / (inputs @ weight).square().sum()
    assert found.rows == 1 and found.with_rows == pytest.approx(float(energy), rel=1e-8)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--windows", "2", "--ratios", "0.6"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["0.6", "plain"], ["0.6", "pivoted"]]
    for line in lines[1:]:
        without, with_rows = map(float, line.split()[2:4])
        assert with_rows <= without < 1.0
