"""What every local importance keeps: a Gram stays a Gram, same in same out, and its word."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from bs_exp.protocols import Importance
from bs_exp.types import GroupStatistics, InputMoments, Statistic, WeightGradient, WeightGroup
from bs_exp.whitening.gram import GramWhitening

CHANNELS, TOKENS = 24, 200


class ImportanceContract:
    """Subclass it as `TestMine`, with a fixture `importance` that returns the strategy."""

    @pytest.fixture(scope="class")
    @classmethod
    def importance(cls) -> Importance:
        """The strategy."""
        raise NotImplementedError("override the fixture `importance`: it returns the strategy.")

    def test_the_result_is_a_gram_that_can_whiten(self, importance: Importance) -> None:
        given = statistics(inputs())
        found = importance.reweight(given)
        gram = gram_of(found)
        assert gram.shape == (CHANNELS, CHANNELS) and gram.dtype == torch.float64
        torch.testing.assert_close(gram, gram.T)
        assert float(torch.linalg.eigvalsh(gram)[0]) > 0.0
        metric = GramWhitening(ridge=0.0).metric(found)
        assert metric.whitener is not None
        restored = metric.whitener.T @ metric.whitener
        torch.testing.assert_close(restored, gram, rtol=1e-9, atol=1e-9 * float(gram.norm()))

    def test_same_in_same_out_and_the_input_is_untouched(self, importance: Importance) -> None:
        given = statistics(inputs())
        before = gram_of(given).clone()
        first, second = gram_of(importance.reweight(given)), gram_of(importance.reweight(given))
        assert torch.equal(first, second)
        assert torch.equal(gram_of(given), before)

    def test_what_is_needed_is_said(self, importance: Importance) -> None:
        """And what is not in `needs` is not read."""
        given = statistics(inputs())
        available: dict[Statistic, dict[str, Any]] = {
            Statistic.GRAM: {"gram": None},
            Statistic.INPUT_MOMENTS: {"moments": None},
            Statistic.WEIGHT_GRADIENT: {"weight_gradient": None},
        }
        for statistic, without in available.items():
            if statistic in importance.needs:
                with pytest.raises(ValueError, match="needs"):
                    importance.reweight(dataclasses.replace(given, **without))
            else:
                importance.reweight(dataclasses.replace(given, **without))


def inputs(seed: int = 0, channels: int = CHANNELS) -> Tensor:
    """Correlated activations with channels of unequal size and heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(TOKENS, channels, generator=generator, dtype=torch.float64)
    mixing = torch.eye(channels, dtype=torch.float64) + 0.1 * torch.randn(
        channels, channels, generator=generator, dtype=torch.float64
    )
    return draws**3 @ mixing * torch.rand(channels, generator=generator, dtype=torch.float64).exp()


def statistics(x: Tensor, *, sensitivity: float = 1.0) -> GroupStatistics:
    """What calibration gathers of inputs `[tokens, channels]`."""
    return GroupStatistics(
        group=WeightGroup("q", (0,), x.shape[1], 16),
        tokens=len(x),
        gram=x.T @ x,
        moments=InputMoments(absolute=x.abs().mean(0), peak=x.abs().amax(0), fourth=x.pow(4).mean(0)),
        weight_gradient=WeightGradient(rows=torch.ones(x.shape[1]).double(), sensitivity=sensitivity),
    )


def gram_of(found: GroupStatistics) -> Tensor:
    """The Gram of statistics that have one."""
    assert found.gram is not None
    return found.gram
