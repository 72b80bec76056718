"""Identities of the factorisation, and oracles written from the formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bs_exp.errors import DecompositionError
from bs_exp.linalg.cholesky import cholesky_whitener
from bs_exp.linalg.decomposition import decompose, spectrum_of, truncate
from bs_exp.types import LossUnit, Metric, WeightGroup
from tests.support.options import strategy

IDENTITY = Metric(whitener=None)


def gram_metric(gram: Tensor, *, ridge: float = 0.0) -> Metric:
    whitener, added = cholesky_whitener(gram, ridge=ridge)
    return Metric(whitener=whitener, ridge=added)


def problem(d_in: int, d_out: int, size: int, tokens: int = 400, seed: int = 0) -> tuple[WeightGroup, Tensor, Tensor]:
    """A group, its concatenated weight, and correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d_in, d_in, generator=generator, dtype=torch.float64) / d_in**0.5
    inputs = torch.randn(tokens, d_in, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(d_in, size * d_out, generator=generator, dtype=torch.float64)
    return WeightGroup("q", tuple(range(size)), d_in, d_out), weight, inputs


def product(group: WeightGroup, weight: Tensor, metric: Metric, rank: int) -> Tensor:
    factors = truncate(decompose(group, weight, metric), rank)
    return torch.cat([factors.basis @ factors.coefficients[layer] for layer in group.layers], dim=1)


SHAPES = [(12, 20, 1), (12, 12, 3), (30, 8, 1), (30, 8, 2), (16, 16, 1)]


@pytest.mark.parametrize(("d_in", "d_out", "size"), SHAPES)
def test_full_rank_returns_the_weight(d_in: int, d_out: int, size: int) -> None:
    group, weight, inputs = problem(d_in, d_out, size)
    restored = product(group, weight, gram_metric(inputs.T @ inputs), group.full_rank)
    torch.testing.assert_close(restored, weight, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("d_in", "d_out", "size"), SHAPES)
@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_predicted_loss_is_the_measured_loss(d_in: int, d_out: int, size: int, ridge: float) -> None:
    group, weight, inputs = problem(d_in, d_out, size)
    metric = gram_metric(inputs.T @ inputs, ridge=ridge)
    spectrum = decompose(group, weight, metric).spectrum
    for rank in (1, group.full_rank // 2, group.full_rank - 1):
        measured = float((inputs @ (weight - product(group, weight, metric, rank))).norm())
        assert spectrum.loss(rank) == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize(("d_in", "d_out", "size"), SHAPES)
def test_truncation_is_the_whitened_svd_of_the_papers(d_in: int, d_out: int, size: int) -> None:
    """Oracle: Cholesky, a full SVD of S W, and S^-1 [S W]_k (SVD-LLM, section 3.1)."""
    group, weight, inputs = problem(d_in, d_out, size)
    whitener = torch.linalg.cholesky(inputs.T @ inputs).T
    left, values, right = torch.linalg.svd(whitener @ weight, full_matrices=False)
    rank = group.full_rank // 2
    expected = torch.linalg.inv(whitener) @ (left[:, :rank] * values[:rank]) @ right[:rank]
    metric = gram_metric(inputs.T @ inputs)
    torch.testing.assert_close(product(group, weight, metric, rank), expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(decompose(group, weight, metric).spectrum.singular_values, values, rtol=1e-9, atol=1e-9)


def test_identity_metric_is_plain_svd() -> None:
    group, weight, _ = problem(10, 14, 1)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    expected = (left[:, :4] * values[:4]) @ right[:4]
    torch.testing.assert_close(product(group, weight, IDENTITY, 4), expected, rtol=1e-9, atol=1e-9)


def test_no_other_product_of_this_rank_loses_less() -> None:
    group, weight, inputs = problem(8, 9, 1)
    best = product(group, weight, gram_metric(inputs.T @ inputs), 3)
    loss = float((inputs @ (weight - best)).norm())
    generator = torch.Generator().manual_seed(1)
    factors = truncate(decompose(group, weight, gram_metric(inputs.T @ inputs)), 3)
    for _ in range(50):
        step = 1e-3 * torch.randn(8, 3, generator=generator, dtype=torch.float64)
        nearby = (factors.basis + step) @ factors.coefficients[0]
        assert float((inputs @ (weight - nearby)).norm()) >= loss


def test_scaling_every_gram_changes_nothing_but_the_loss() -> None:
    group, weight, inputs = problem(9, 12, 2)
    gram = inputs.T @ inputs
    torch.testing.assert_close(
        product(group, weight, gram_metric(gram), 5), product(group, weight, gram_metric(1e6 * gram), 5)
    )


def test_components_are_balanced() -> None:
    group, weight, inputs = problem(12, 20, 1)
    made = decompose(group, weight, gram_metric(1e8 * inputs.T @ inputs))
    torch.testing.assert_close(made.basis_t.norm(dim=1), made.coefficients.norm(dim=1))


@settings(max_examples=40, deadline=None)
@given(
    d_in=st.integers(2, 12), d_out=st.integers(1, 10), size=st.integers(1, 3), tokens=st.integers(1, 30),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_singular_grams_survive(d_in: int, d_out: int, size: int, tokens: int, seed: int) -> None:
    """Fewer tokens than channels: no ridge was asked for, one is found, and full rank still returns the weight."""
    group, weight, inputs = problem(d_in, d_out, size, tokens=tokens, seed=seed)
    metric = gram_metric(inputs.T @ inputs)
    restored = product(group, weight, metric, group.full_rank)
    assert bool(restored.isfinite().all())
    assert float((inputs @ (restored - weight)).norm()) <= 1e-5 * float((inputs @ weight).norm())


def test_an_indefinite_gram_survives_and_says_what_it_took() -> None:
    _, _, inputs = problem(6, 6, 1)
    gram = inputs.T @ inputs
    low = torch.linalg.eigvalsh(gram)[0]
    shifted = gram - (low + 0.5) * torch.eye(6, dtype=gram.dtype)
    metric = gram_metric(shifted)
    added = torch.as_tensor(metric.ridge)
    assert float(added.max()) > 0.5 and metric.mean_ridge == float(added.mean())
    assert metric.whitener is not None
    torch.testing.assert_close(metric.whitener.T @ metric.whitener, shifted + torch.diag(added))


def test_the_ridge_does_not_depend_on_the_scale_of_channels() -> None:
    """Channels in other units give the same components in these units: the whitener is scaled, and nothing else."""
    group, weight, inputs = problem(12, 20, 1)
    units = torch.logspace(-6, 6, 12, dtype=torch.float64)[
        torch.randperm(12, generator=torch.Generator().manual_seed(3))
    ]
    plain, scaled = (gram_metric(x.T @ x, ridge=1e-3) for x in (inputs, inputs * units))
    assert plain.whitener is not None and scaled.whitener is not None
    torch.testing.assert_close(scaled.whitener / units, plain.whitener, rtol=1e-9, atol=1e-12)
    first, second = product(group, weight, plain, 5), product(group, weight / units[:, None], scaled, 5)
    torch.testing.assert_close(second * units[:, None], first, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("outlier", [1.0, 1e2, 1e4, 1e5, 1e-6])
@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_the_default_ridge_costs_nothing_beside_one_large_channel(outlier: float, decay: float) -> None:
    """Oracle: the singular values of `X W`. A ridge of the mean diagonal cost up to 16 times the optimum here."""
    d, rank = 64, 21
    generator = torch.Generator().manual_seed(1)
    spread = torch.arange(1, d + 1, dtype=torch.float64) ** -decay
    mixing = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    inputs = torch.randn(8 * d, d, generator=generator, dtype=torch.float64) * spread @ mixing
    inputs[:, 3] *= outlier
    weight = torch.randn(d, d, generator=generator, dtype=torch.float64)
    ridge = strategy("whitening=gram").ridge
    found = product(WeightGroup("q", (0,), d, d), weight, gram_metric(inputs.T @ inputs, ridge=ridge), rank)
    optimum = float(torch.linalg.svdvals(inputs @ weight)[rank:].square().sum().sqrt())
    assert float((inputs @ (weight - found)).norm()) <= 1.001 * optimum


def test_zero_weight_and_dead_channels_do_not_break() -> None:
    group, weight, inputs = problem(8, 10, 1)
    inputs[:, 3] = 0.0
    weight[:, 2] = 0.0
    metric = gram_metric(inputs.T @ inputs, ridge=1e-6)
    torch.testing.assert_close(product(group, weight, metric, 8), weight, rtol=0, atol=1e-9)
    assert float(product(group, torch.zeros_like(weight), metric, 2).abs().max()) == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_raises(bad: float) -> None:
    group, weight, inputs = problem(6, 6, 1)
    broken = weight.clone()
    broken[1, 2] = bad
    with pytest.raises(DecompositionError, match="weight holds NaN"):
        decompose(group, broken, gram_metric(inputs.T @ inputs))
    gram = inputs.T @ inputs
    gram[0, 0] = bad
    with pytest.raises(DecompositionError, match="Gram of the inputs holds NaN"):
        gram_metric(gram)
    with pytest.raises(DecompositionError, match="all inputs of these matrices are zero"):
        gram_metric(torch.zeros(4, 4))


@pytest.mark.parametrize("rank", [0, 7])
def test_rank_out_of_range(rank: int) -> None:
    group, weight, _ = problem(6, 9, 1)
    with pytest.raises(ValueError, match="between 1 and 6"):
        truncate(decompose(group, weight, IDENTITY), rank)


def output_factors(d_out: int, layers: tuple[int, ...], seed: int = 3) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: torch.linalg.cholesky(
            (g := torch.randn(3 * d_out, d_out, generator=generator, dtype=torch.float64)).T @ g / 3
        )
        for layer in layers
    }


@pytest.mark.parametrize(("d_in", "d_out", "size"), SHAPES)
def test_two_sided_truncation_is_the_svd_between_both_factors(d_in: int, d_out: int, size: int) -> None:
    """Oracle: S W R by hand, full SVD, S^-1 [S W R]_k R^-1; and its loss is half the squared discarded values."""
    group, weight, inputs = problem(d_in, d_out, size)
    one = gram_metric(inputs.T @ inputs)
    right = output_factors(d_out, group.layers)
    metric = Metric(whitener=one.whitener, right=right, unit=LossUnit.NATS)
    assert one.whitener is not None
    full_right = torch.block_diag(*(right[layer] for layer in group.layers))
    left, values, v = torch.linalg.svd(one.whitener @ weight @ full_right, full_matrices=False)
    rank = group.full_rank // 2
    expected = (
        torch.linalg.inv(one.whitener) @ (left[:, :rank] * values[:rank]) @ v[:rank] @ torch.linalg.inv(full_right)
    )
    found = product(group, weight, metric, rank)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)
    error = (one.whitener @ (weight - found) @ full_right).norm() ** 2 / 2
    assert decompose(group, weight, metric).spectrum.loss(rank) == pytest.approx(float(error), rel=1e-8)
    torch.testing.assert_close(product(group, weight, metric, group.full_rank), weight, rtol=0, atol=1e-10)


def test_equal_output_weights_are_no_output_weights() -> None:
    group, weight, inputs = problem(9, 12, 2)
    one = gram_metric(inputs.T @ inputs)
    same = {layer: 3.0 * torch.eye(12, dtype=torch.float64) for layer in group.layers}
    two = Metric(whitener=one.whitener, right=same, unit=LossUnit.NATS)
    torch.testing.assert_close(product(group, weight, one, 4), product(group, weight, two, 4))


@pytest.mark.parametrize(("d_in", "d_out", "size"), [(12, 9, 1), (12, 9, 3), (30, 8, 2)])
@pytest.mark.parametrize("two_sided", [False, True])
def test_eigenvalues_alone_give_the_spectrum_of_the_decomposition(
    d_in: int, d_out: int, size: int, two_sided: bool
) -> None:
    group, weight, inputs = problem(d_in, d_out, size)
    metric = gram_metric(inputs.T @ inputs)
    if two_sided:
        metric = replace(metric, right=output_factors(d_out, group.layers), unit=LossUnit.NATS)
    alone, full = spectrum_of(group, weight, metric), decompose(group, weight, metric).spectrum
    assert alone.singular_values.shape == full.singular_values.shape == (group.full_rank,)
    torch.testing.assert_close(alone.singular_values, full.singular_values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alone.energies, full.energies, rtol=1e-9, atol=1e-9)
    assert alone.unit is full.unit


@pytest.mark.parametrize(("d_in", "d_out", "size"), SHAPES)
@pytest.mark.parametrize("kind", ["symmetric", "turned", "tall", "lower"])
def test_any_root_of_a_gram_gives_the_factors_of_the_triangular_one(
    d_in: int, d_out: int, size: int, kind: str
) -> None:
    """Oracle: Cholesky's triangle. Solved as if it were triangular, another root would give other weights."""
    group, weight, inputs = problem(d_in, d_out, size)
    gram = inputs.T @ inputs
    values, vectors = torch.linalg.eigh(gram)
    whitener, _ = cholesky_whitener(gram)
    roots = {
        "symmetric": vectors * values.sqrt() @ vectors.T,
        "turned": vectors @ whitener,
        "tall": inputs,
        "lower": torch.linalg.cholesky(gram.flip(0).flip(1)).flip(0).flip(1).T,
    }
    found = Metric(whitener=roots[kind], unit=LossUnit.OUTPUT_NORM)
    assert found.whitener is not None
    torch.testing.assert_close(found.whitener, whitener, rtol=1e-9, atol=1e-11 * float(whitener.norm()))
    rank = group.full_rank // 2
    expected = product(group, weight, Metric(whitener=whitener, unit=LossUnit.OUTPUT_NORM), rank)
    torch.testing.assert_close(product(group, weight, found, rank), expected, rtol=1e-8, atol=1e-8)
    restored = product(group, weight, found, group.full_rank)
    torch.testing.assert_close(restored, weight, rtol=0, atol=1e-9)


def test_any_right_root_does_as_well() -> None:
    group, weight, inputs = problem(12, 9, 3)
    lower = output_factors(9, group.layers)
    turn = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(5)).double()).Q
    plain = gram_metric(inputs.T @ inputs)
    known = replace(plain, right=lower)
    found = replace(plain, right={layer: root @ turn for layer, root in lower.items()})
    assert found.right is not None
    for layer, root in found.right.items():
        assert torch.equal(root, root.tril())
        torch.testing.assert_close(root @ root.T, lower[layer] @ lower[layer].T)
    torch.testing.assert_close(product(group, weight, found, 5), product(group, weight, known, 5))


def test_triangular_roots_keep_their_bits() -> None:
    upper = torch.randn(9, 9, generator=torch.Generator().manual_seed(0)).double().triu()
    metric = Metric(whitener=upper, right={0: upper.T})
    assert metric.whitener is upper
    assert metric.right is not None and torch.equal(metric.right[0], upper.T)


@pytest.mark.parametrize("root", [torch.ones(3, 4), torch.ones(4)])
def test_a_root_without_an_inverse_is_refused(root: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Metric\.whitener must be a matrix with at least as many rows"):
        Metric(whitener=root)


def test_a_root_of_lower_rank_keeps_its_gram() -> None:
    root = torch.zeros(4, 4, dtype=torch.float64)
    root[3, 0] = -2.0
    found = Metric(whitener=root).whitener
    assert found is not None and torch.equal(found, found.triu())
    torch.testing.assert_close(found.T @ found, root.T @ root)
