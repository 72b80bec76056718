"""Decompositions that multiply by a Gram and take no root of it: as exact, also where Grams are ill conditioned."""

from __future__ import annotations

from dataclasses import replace

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from bs_exp.linalg.cholesky import cholesky_whitener, damped_root
from bs_exp.linalg.decomposition import decompose, needs_left_root, needs_right_root, spectrum_of, truncate
from bs_exp.types import GramRoot, LossUnit, Metric, WeightGroup

RIDGE, DAMPING = 1e-12, 1e-10
WIDE, TALL = WeightGroup("q", (0, 1), 6, 5), WeightGroup("q", (0, 1), 9, 3)


def gram(channels: int, condition: float, kind: str, seed: int) -> Tensor:
    """`scaled`: channels of very different sizes. `turned`: a condition that no scaling of channels removes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4 * channels, channels, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -np.log10(condition) / 2, channels, dtype=torch.float64)
    if kind == "turned":
        turn = torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=torch.float64)).Q
        rows = rows * scales @ turn
    else:
        rows = rows * scales[torch.randperm(channels, generator=generator)]
    return rows.mT @ rows


def metric(group: WeightGroup, inputs: Tensor, outputs: dict[int, Tensor] | None, *, roots: bool) -> Metric:
    """As the strategies make it, or (`roots`) with Cholesky factors on both sides."""
    left, ridge = damped_root(inputs, ridge=RIDGE, needed=roots or needs_left_root(group))
    if outputs is None:
        return Metric(whitener=left, ridge=ridge, unit=LossUnit.OUTPUT_NORM)
    right: dict[int, Tensor | GramRoot] = {}
    for layer, each in outputs.items():
        root, _ = damped_root(each, ridge=DAMPING, needed=roots or needs_right_root(group))
        right[layer] = root.mT if isinstance(root, Tensor) else root
    return Metric(whitener=left, ridge=ridge, right=right, unit=LossUnit.NATS)


def case(
    group: WeightGroup, condition: float, kind: str, two_sided: bool
) -> tuple[Tensor, Tensor, dict[int, Tensor] | None]:
    weight = torch.randn(group.d_in, group.columns, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    outputs = {layer: gram(group.d_out, condition, kind, 5 + layer) for layer in group.layers}
    return weight, gram(group.d_in, condition, kind, 3), outputs if two_sided else None


def exact(matrix: Tensor) -> mpmath.matrix:
    return mpmath.matrix(matrix.tolist())


def damped(matrix: Tensor, share: float) -> mpmath.matrix:
    found = exact(matrix)
    for i in range(found.rows):
        found[i, i] *= 1 + mpmath.mpf(share)
    return found


def lower_root(matrix: mpmath.matrix) -> mpmath.matrix:
    return mpmath.cholesky(matrix)


@pytest.mark.parametrize("group", [WIDE, TALL], ids=["wide", "tall"])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("kind", ["scaled", "turned"])
@pytest.mark.parametrize("condition", [1e2, 1e10, 1e14, 1e18])
def test_losses_are_exact_and_best_on_ill_conditioned_grams(
    group: WeightGroup, two_sided: bool, kind: str, condition: float
) -> None:
    """Oracle: singular values of `S W R`, and the error of the factors in that metric, in 60 digits."""
    weight, inputs, outputs = case(group, condition, kind, two_sided)
    made = decompose(group, weight, metric(group, inputs, outputs, roots=False))
    with mpmath.workdps(60):
        left = lower_root(damped(inputs, RIDGE)).T
        rights = [lower_root(damped(outputs[layer], DAMPING)) for layer in group.layers] if outputs else None

        def in_metric(columns: mpmath.matrix) -> mpmath.matrix:
            scaled = left * columns
            if rights is None:
                return scaled
            result = scaled.copy()
            for block, right in enumerate(rights):
                start = block * group.d_out
                result[:, start : start + group.d_out] = scaled[:, start : start + group.d_out] * right
            return result

        values = sorted(mpmath.svd_r(in_metric(exact(weight)), compute_uv=False), reverse=True)
        whole = sum(value**2 for value in values)
        for rank in range(1, group.full_rank):
            factors = truncate(made, rank)
            coefficients = torch.cat([factors.coefficients[layer] for layer in group.layers], dim=1)
            error = in_metric(exact(weight) - exact(factors.basis) * exact(coefficients))
            found = sum(entry**2 for entry in error) / whole
            optimum = sum(value**2 for value in values[rank:]) / whole
            assert found <= optimum * (1 + 1e-6) + 1e-13, (rank, float(found), float(optimum))
            if two_sided:
                predicted = 2.0 * made.spectrum.loss(rank) / float(whole)
                assert predicted == pytest.approx(float(found), rel=1e-5, abs=1e-15), rank


@pytest.mark.parametrize("group", [WIDE, TALL, replace(WIDE, layers=(0,)), WeightGroup("q", (2,), 8, 8)], ids=repr)
@pytest.mark.parametrize("two_sided", [False, True])
def test_the_gram_of_a_side_gives_what_its_root_gives(group: WeightGroup, two_sided: bool) -> None:
    weight, inputs, outputs = case(group, 1e4, "turned", two_sided)
    grams, roots = (metric(group, inputs, outputs, roots=roots) for roots in (False, True))
    one, other = (decompose(group, weight, each) for each in (grams, roots))
    torch.testing.assert_close(one.spectrum.singular_values, other.spectrum.singular_values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(one.spectrum.energies, other.spectrum.energies, rtol=1e-8, atol=1e-12)
    for rank in (1, group.full_rank // 2, group.full_rank):
        products = [made.basis_t[:rank].mT @ made.coefficients[:rank] for made in (one, other)]
        torch.testing.assert_close(*products, rtol=1e-8, atol=1e-10)
    alone = spectrum_of(group, weight, grams)
    torch.testing.assert_close(alone.energies, spectrum_of(group, weight, roots).energies, rtol=1e-7, atol=1e-10)


def test_no_root_of_the_larger_side_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A root that nobody may make: the decomposition succeeds without, and reading it would raise."""

    def refuse() -> Tensor:
        raise AssertionError("the larger side was factorised")

    for group in (WIDE, TALL):
        weight, inputs, outputs = case(group, 1e2, "turned", True)
        assert outputs is not None
        left, _ = damped_root(inputs, ridge=RIDGE, needed=needs_left_root(group))
        right = {
            layer: damped_root(each, ridge=DAMPING, needed=needs_right_root(group))[0]
            for layer, each in outputs.items()
        }
        if isinstance(left, GramRoot):
            left = replace(left, factorise=refuse)
        closed = {
            layer: replace(root, factorise=refuse) if isinstance(root, GramRoot) else root.mT
            for layer, root in right.items()
        }
        found = Metric(whitener=left, right=closed, unit=LossUnit.NATS)
        decompose(group, weight, found)
        spectrum_of(group, weight, found)
        with pytest.raises(AssertionError, match="larger side"):
            _ = found.whitener if group is TALL else found.right[0]  # type: ignore[index]


def test_a_root_that_is_asked_for_later_is_the_same() -> None:
    inputs = gram(7, 1e6, "turned", 1)
    lazy, added = damped_root(inputs, ridge=1e-3, needed=False)
    root, also = cholesky_whitener(inputs, ridge=1e-3)
    assert isinstance(lazy, GramRoot) and torch.equal(added, also)
    found = Metric(whitener=lazy, right={0: lazy})
    assert found.whitener is not None and found.right is not None
    assert torch.equal(found.whitener, root) and torch.equal(found.right[0], root.mT)
    weight = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(lazy.times(weight), root.mT @ (root @ weight))
    assert replace(found, damping=1.0).right is found.right
