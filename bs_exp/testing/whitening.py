"""What every whitening keeps: a usable metric, the optimum in it, same in same out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from bs_exp.linalg.decomposition import decompose, truncate
from bs_exp.protocols import Whitening
from bs_exp.types import GroupStatistics, InputMoments, Metric, Statistic, WeightGradient, WeightGroup

TOKENS = 300
GROUPS = [WeightGroup("q", (0,), 20, 12), WeightGroup("q", (0, 1), 20, 16), WeightGroup("down", (3,), 12, 30)]
IN_GROUPS = pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)


class WhiteningContract:
    """Subclass it as `TestMine`, with a fixture `whitening` that returns the strategy."""

    @pytest.fixture(scope="class")
    @classmethod
    def whitening(cls) -> Whitening:
        """The strategy."""
        raise NotImplementedError("override the fixture `whitening`: it returns the strategy.")

    @IN_GROUPS
    def test_the_metric_is_upper_triangular_and_invertible(self, whitening: Whitening, group: WeightGroup) -> None:
        metric = whitening.metric(statistics(group))
        if metric.whitener is not None:
            assert metric.whitener.shape == (group.d_in, group.d_in) and metric.whitener.dtype == torch.float64
            assert torch.equal(metric.whitener, metric.whitener.triu())
            assert bool((metric.whitener.diagonal() > 0).all())
        assert bool((torch.as_tensor(metric.ridge) >= 0.0).all())

    @IN_GROUPS
    def test_truncation_is_the_optimum_in_the_metric_and_predicts_its_error(
        self, whitening: Whitening, group: WeightGroup
    ) -> None:
        """Oracle: the definition of the metric's norm; Eckart and Young's bound from a full SVD of the whitened."""
        weight = normal(group.d_in, group.columns, seed=7)
        metric = whitening.metric(statistics(group))
        decomposition = decompose(group, weight, metric)
        for rank in (1, group.full_rank // 2, group.full_rank):
            factors = truncate(decomposition, rank)
            product = torch.cat([factors.basis @ factors.coefficients[layer] for layer in group.layers], dim=1)
            measured = error(metric, group, weight - product)
            predicted = float(decomposition.spectrum.energies[rank:].sum())
            smallest = 1e-9 * float(decomposition.spectrum.energies.sum())
            assert predicted == pytest.approx(measured, rel=1e-6, abs=smallest)
        assert torch.allclose(product, weight, atol=1e-8)  # full rank
        if metric.right is None:
            whitened = weight if metric.whitener is None else metric.whitener @ weight
            torch.testing.assert_close(decomposition.spectrum.singular_values, torch.linalg.svdvals(whitened))

    def test_same_in_same_out_and_the_input_is_untouched(self, whitening: Whitening) -> None:
        given, before = statistics(GROUPS[1]), statistics(GROUPS[1])
        first, second = whitening.metric(given), whitening.metric(given)
        assert torch.equal(torch.as_tensor(first.ridge), torch.as_tensor(second.ridge))
        assert (first.damping, first.unit) == (second.damping, second.unit)
        if first.whitener is not None:
            assert torch.equal(first.whitener, whitener_of(second))
        for one, other in zip(_tensors(given), _tensors(before), strict=True):
            assert torch.equal(one, other)

    def test_what_is_needed_is_said(self, whitening: Whitening) -> None:
        """And what is not in `needs` is not read."""
        given = statistics(GROUPS[0])
        available: dict[Statistic, dict[str, Any]] = {
            Statistic.GRAM: {"gram": None},
            Statistic.OUTPUT_GRAM: {"output_grams": None},
            Statistic.SAMPLED_OUTPUT_GRAM: {"sampled_grams": None},
            Statistic.TOP_K_OUTPUT_GRAM: {"top_k_grams": None},
            Statistic.PROBED_OUTPUT_GRAM: {"probed_grams": None},
            Statistic.INPUT_MOMENTS: {"moments": None},
            Statistic.WEIGHT_GRADIENT: {"weight_gradient": None},
            Statistic.LOSS_GRADIENT: {"loss_gradient": None},
        }
        for statistic, without in available.items():
            if statistic in whitening.needs:
                with pytest.raises(ValueError, match="needs"):
                    whitening.metric(dataclasses.replace(given, **without))
            else:
                whitening.metric(dataclasses.replace(given, **without))


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in fp64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(group: WeightGroup) -> Tensor:
    """The inputs of the group's layers, stacked: correlated, with channels of unequal size."""
    mixing = torch.eye(group.d_in, dtype=torch.float64) + 0.3 * normal(group.d_in, group.d_in, seed=1)
    return normal(TOKENS * group.size, group.d_in) @ mixing * torch.linspace(0.2, 3.0, group.d_in).double()


def statistics(group: WeightGroup) -> GroupStatistics:
    """All that calibration can gather for a group, of `inputs` and of random gradients."""
    x = inputs(group)
    gradients = {layer: normal(TOKENS, group.d_out, seed=10 + layer) / 10 for layer in group.layers}
    return GroupStatistics(
        group=group,
        tokens=TOKENS,
        gram=x.T @ x,
        output_grams={layer: g.T @ g for layer, g in gradients.items()},
        moments=InputMoments(absolute=x.abs().mean(0), peak=x.abs().amax(0), fourth=x.pow(4).mean(0)),
        weight_gradient=WeightGradient(rows=normal(group.d_in, seed=3).square(), sensitivity=1.0),
        loss_gradient=normal(group.d_in, group.columns, seed=4),
        sampled_grams={layer: 2.0 * g.T @ g for layer, g in gradients.items()},
        top_k_grams={layer: 3.0 * g.T @ g for layer, g in gradients.items()},
        probed_grams={layer: 4.0 * g.T @ g for layer, g in gradients.items()},
        probed_outputs=TOKENS // 2,
    )


def whitener_of(metric: Metric) -> Tensor:
    """The whitener of a metric that has one."""
    assert metric.whitener is not None
    return metric.whitener


def error(metric: Metric, group: WeightGroup, difference: Tensor) -> float:
    """The norm of an error in a metric, in the metric's unit, squared unless that is nats."""
    left = difference if metric.whitener is None else metric.whitener @ difference
    blocks = dict(zip(group.layers, left.split(group.d_out, dim=1), strict=True))
    if metric.right is not None:
        blocks = {layer: block @ metric.right[layer] for layer, block in blocks.items()}
    total = sum(float(block.square().sum()) for block in blocks.values())
    if metric.unit.is_second_order:
        return total / 2
    ridge = torch.as_tensor(metric.ridge, dtype=torch.float64).expand(group.d_in)
    return total - float((ridge[:, None] * difference.square()).sum())  # the ridge is no error


def _tensors(given: GroupStatistics) -> list[Tensor]:
    assert given.gram is not None and given.output_grams and given.moments and given.weight_gradient
    moments = given.moments
    outputs = given.output_grams.values()
    return [given.gram, *outputs, moments.absolute, moments.peak, moments.fourth, given.weight_gradient.rows]
