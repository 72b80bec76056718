"""What layers have for themselves: losses from the formulas, and the best approximation of its rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bs_exp.linalg.cholesky import cholesky_whitener
from bs_exp.linalg.corrections import corrections_of
from bs_exp.linalg.decomposition import decompose, spectrum_of, truncate
from bs_exp.types import LossUnit, Metric, WeightGroup


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metric(kind: str, d_in: int, d_out: int) -> Metric:
    inputs, outputs = normal(40, d_in, seed=1), normal(2, 40, d_out, seed=2)
    if kind == "identity":
        return Metric(whitener=None)
    whitener, ridge = cholesky_whitener(inputs.mT @ inputs, ridge=0.1)
    if kind == "gram":
        return Metric(whitener=whitener, ridge=ridge)
    right = {i: torch.linalg.cholesky(outputs[i].mT @ outputs[i]) for i in range(2)}
    return Metric(whitener=whitener, ridge=ridge, right=right, unit=LossUnit.NATS)


@pytest.mark.parametrize("kind", ["identity", "gram", "nats"])
@pytest.mark.parametrize("shape", [(8, 6), (6, 9), (14, 5)])
def test_losses_at_every_rank_are_those_of_the_products(kind: str, shape: tuple[int, int]) -> None:
    """Oracle: the error of the products themselves, in the metric (without its ridge, unless in nats)."""
    d_in, d_out = shape
    group = WeightGroup("q", (0, 1), d_in, d_out, correction=2)
    weight, norm = normal(d_in, 2 * d_out), metric(kind, d_in, d_out)
    found = decompose(group, weight, norm)
    whitener = torch.eye(d_in, dtype=torch.float64) if norm.whitener is None else norm.whitener
    gram = whitener.mT @ whitener
    if kind == "gram":
        gram = gram - torch.diag(torch.as_tensor(norm.ridge))
    for rank in range(1, group.full_rank + 1):
        shared = truncate(found, rank)
        own = corrections_of(group, found.basis_t, found.coefficients, norm, rank)
        total = 0.0
        for layer, block in enumerate(weight.split(d_out, dim=1)):
            down, up = own[layer]
            assert down.shape[1] == up.shape[0] <= 2
            lost = block - shared.basis @ shared.coefficients[layer] - down @ up
            if norm.right is not None:
                lost = lost @ norm.right[layer]
            total += float((lost * (gram @ lost)).sum())
        expected = total / 2 if kind == "nats" else max(total, 0.0) ** 0.5
        assert found.spectrum.loss(rank) == pytest.approx(expected, rel=1e-6, abs=1e-6), rank
    assert torch.equal(spectrum_of(group, weight, norm).energies, found.spectrum.energies)


@pytest.mark.parametrize("kind", ["identity", "nats"])
def test_a_correction_is_the_best_of_its_rank(kind: str) -> None:
    """Oracle: torch's SVD of what the shared factors leave of a layer, in the metric."""
    group, norm = WeightGroup("q", (0, 1), 8, 6, correction=2), metric(kind, 8, 6)
    weight = normal(8, 12)
    found = decompose(group, weight, norm)
    shared = truncate(found, 3)
    own = corrections_of(group, found.basis_t, found.coefficients, norm, 3)
    for layer, block in enumerate(weight.split(6, dim=1)):
        lost = block - shared.basis @ shared.coefficients[layer]
        down, up = own[layer]
        if kind == "nats":
            assert norm.whitener is not None and norm.right is not None
            lost = norm.whitener @ lost @ norm.right[layer]
            product = norm.whitener @ down @ up @ norm.right[layer]
        else:
            product = down @ up
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
        torch.testing.assert_close(product, (left[:, :2] * values[:2]) @ right[:2], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(down.norm(dim=0), up.norm(dim=1))


def test_losses_of_large_groups_are_close_between_the_points() -> None:
    """More ranks than points: what is interpolated, against the products at all of some ranks in between."""
    group, norm = WeightGroup("q", (0, 1), 150, 100, correction=4), Metric(whitener=None)
    falling = torch.linspace(0.0, -6.0, 150, dtype=torch.float64).exp()
    weight = falling[:, None] * normal(150, 200)
    found = decompose(group, weight, norm)
    for rank in (3, 20, 47, 90, 131, 149):
        shared = truncate(found, rank)
        own = corrections_of(group, found.basis_t, found.coefficients, norm, rank)
        blocks = enumerate(weight.split(100, dim=1))
        lost = [w - shared.basis @ shared.coefficients[i] - own[i][0] @ own[i][1] for i, w in blocks]
        assert found.spectrum.loss(rank) == pytest.approx(float(torch.cat(lost, dim=1).norm()), rel=5e-3, abs=1e-9)
    assert bool((found.spectrum.energies >= 0).all())
