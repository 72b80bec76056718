"""Sharing where it pays: the losses are recomputed from the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bs_exp.errors import ConfigError
from bs_exp.sharing.criterion import CriterionSharing
from bs_exp.testing.measures import GivenMeasures, architecture, problem, random_measures
from bs_exp.types import LossUnit, Statistic


def criterion(**settings: Any) -> CriterionSharing:
    return CriterionSharing(**{"matrices": ("q",), "norm": "whitened", "squared": False, "max_size": 3, **settings})


def loss(measures: GivenMeasures, layers: tuple[int, ...], norm: str, ratio: float, *, squared: bool) -> float:
    """Truncated SVD of `S W` with torch's own SVD, at the papers' rank. `S^T S` is the sum of the layers' Grams."""
    weight = torch.cat([measures.weights["q", layer] for layer in layers], dim=1)
    gram = torch.stack([measures.grams["q", layer] for layer in layers]).sum(0)
    d_in, columns = weight.shape
    rank = int(ratio * d_in * columns / (d_in + columns))
    whitener = torch.eye(d_in, dtype=torch.float64) if norm == "frobenius" else torch.linalg.cholesky(gram).mT
    left, values, right = torch.linalg.svd(whitener @ weight, full_matrices=False)
    if norm != "output":
        found = float(values[rank:].norm())
        return found if not squared else found**2 if norm == "frobenius" else found**2 / len(layers)
    product = torch.linalg.solve(whitener, (left[:, :rank] * values[:rank]) @ right[:rank])
    lost: list[Tensor] = list((weight - product).split(columns // len(layers), dim=1))
    errors = [torch.trace(d.mT @ measures.grams["q", layer] @ d) for d, layer in zip(lost, layers, strict=True)]
    return float(torch.stack(errors).sum())


@pytest.mark.parametrize("norm", ["frobenius", "whitened", "output"])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_groups_are_grown_by_the_rule(norm: str, squared: bool, seed: int) -> None:
    model, ratio = architecture(7, q=(10, 14)), 0.6
    measures = random_measures(model, seed)
    expected: list[tuple[int, ...]] = [(0,)]
    for layer in range(1, 7):
        group = expected[-1]
        first, second, joint = (
            loss(measures, layers, norm, ratio, squared=squared) for layers in (group, (layer,), (*group, layer))
        )
        if len(group) < 3 and joint <= first + second:
            expected[-1] = (*group, layer)
        else:
            expected.append((layer,))
    groups = criterion(norm=norm, squared=squared).groups(problem(model, measures, ratio))
    assert [g.layers for g in groups] == expected


def test_equal_layers_share_and_unrelated_ones_do_not() -> None:
    model = architecture(4, q=(12, 12))
    generator = torch.Generator().manual_seed(0)
    same, other = (torch.randn(12, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    # 0 and 1 are equal; 2 and 3 are of rank 2 with nothing in common, so apart they lose nothing at rank 2.
    low = [other[:, i : i + 2] @ other[i : i + 2] for i in (0, 2)]
    weights = {("q", 0): same, ("q", 1): same, ("q", 2): 9 * low[0], ("q", 3): 9 * low[1]}
    eye = torch.eye(12, dtype=torch.float64)
    case = problem(model, GivenMeasures(weights, dict.fromkeys(weights, eye)), ratio=0.38)  # rank 2 alone, 3 as a pair
    for norm in ("frobenius", "whitened", "output"):
        groups = criterion(norm=norm, squared=True).groups(case)
        assert [g.layers for g in groups] == [(0, 1), (2,), (3,)], norm


def test_losses_in_nats_are_added_as_they_are() -> None:
    """A loss in nats is a square already, on the inputs of one layer."""
    model = architecture(6, q=(10, 14))
    for seed in range(5):
        nats = problem(model, random_measures(model, seed, LossUnit.NATS))
        norms = problem(model, random_measures(model, seed))
        plain, squared = (criterion(squared=squared).groups(nats) for squared in (False, True))
        assert plain == squared == criterion(squared=True).groups(norms)


def test_squares_are_stricter_than_norms() -> None:
    model = architecture(8, q=(10, 14))
    case = problem(model, random_measures(model), 0.8)
    norms, squares = (criterion(norm="frobenius", squared=squared).groups(case) for squared in (False, True))
    assert len(norms) < len(squares)


def test_one_layer_at_most_is_no_sharing() -> None:
    model = architecture(4)
    groups = criterion(max_size=1).groups(problem(model, random_measures(model)))
    assert all(g.size == 1 for g in groups)


def test_only_the_output_error_needs_grams_of_its_own() -> None:
    assert criterion(norm="output").needs == {Statistic.GRAM}
    assert criterion(norm="frobenius").needs == criterion(norm="whitened").needs == frozenset()


def test_settings() -> None:
    with pytest.raises(ConfigError, match="norm must be one of frobenius, whitened, output, got 'nuclear'"):
        criterion(norm="nuclear")
    with pytest.raises(ConfigError, match="max_size must be a whole number of at least 1, got 0"):
        criterion(max_size=0)
    with pytest.raises(ConfigError, match="names no matrix type of this model"):
        criterion(matrices=("gate",)).check(architecture(5))
    model = architecture(4)
    case = problem(model, random_measures(model))
    assert criterion(max_size=9).groups(case) == criterion(max_size=4).groups(case)
