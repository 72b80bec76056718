"""Gains are those of least squares on the tokens, taken only where they hold on other tokens, and folded away."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bs_exp.cache import Cache
from bs_exp.errors import ConfigError, DataError, ModelError
from bs_exp.linalg.gains import GainLoss, validated_gains
from bs_exp.linalg.least_squares import InputPairs
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress
from bs_exp.sharing.residual import ResidualSharing
from bs_exp.testing.models import QUIET, Tokens, recipe, updated
from bs_exp.update.lens import Lens
from bs_exp.workspace import Workspace

LENS = Lens(ridge=1e-4, holdout=0.25, seed=0)


class Sample:
    """60 tokens of 6 channels and their drift, and a product of rank 4 that misses a weight."""

    def __init__(self, seed: int) -> None:
        known, random = torch.Generator().manual_seed(1), torch.Generator().manual_seed(seed)
        self.x, noise = (torch.randn(60, 6, generator=random, dtype=torch.float64) for _ in range(2))
        self.dense = 1.3 * self.x + 0.3 * noise
        self.weight, self.fixed = (torch.randn(6, 9, generator=known, dtype=torch.float64) for _ in range(2))
        self.basis = torch.randn(6, 4, generator=known, dtype=torch.float64)
        self.coefficients = torch.randn(4, 9, generator=known, dtype=torch.float64)

    @property
    def loss(self) -> GainLoss:
        return GainLoss.of(
            self.basis, self.coefficients, self.weight, InputPairs.of(self.x, self.dense), 0.1 * self.fixed
        )

    def error(self, gains: torch.Tensor) -> float:
        product = self.basis @ (gains[:, None] * self.coefficients) + 0.1 * self.fixed
        return float((self.x @ product - self.dense @ self.weight).square().sum())


def test_gains_are_those_of_least_squares() -> None:
    """Oracle: torch.linalg.lstsq with the outputs of one direction as a column."""
    sample = Sample(0)
    columns = zip(sample.basis.T, sample.coefficients, strict=True)
    outputs = torch.stack([torch.outer(sample.x @ b, c).flatten() for b, c in columns])
    wanted = (sample.dense @ sample.weight - sample.x @ (0.1 * sample.fixed)).flatten()
    expected = torch.linalg.lstsq(outputs.T, wanted[:, None]).solution[:, 0]
    torch.testing.assert_close(sample.loss.best(0.0), expected, rtol=1e-8, atol=1e-8)
    ones, some = torch.ones(4, dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0, -1.0], dtype=torch.float64)
    change = sample.loss.at(some) - sample.loss.at(ones)
    assert change == pytest.approx(sample.error(some) - sample.error(ones), rel=1e-9)
    assert float((sample.loss.best(1e6) - 1.0).abs().max()) < 1e-4


def test_a_gain_that_does_not_hold_elsewhere_is_not_taken() -> None:
    fitted, other = Sample(0), Sample(2)
    gains = validated_gains(fitted.loss, other.loss, ridge=0.0)
    best, ones = fitted.loss.best(0.0), torch.ones(4, dtype=torch.float64)
    assert all(gain in (1.0, wanted) for gain, wanted in zip(gains.tolist(), best.tolist(), strict=True))
    assert other.error(gains) < other.error(ones)
    against = GainLoss(fitted.loss.square, fitted.loss.square @ ones)  # least at gains of 1
    assert torch.equal(validated_gains(fitted.loss, against, ridge=0.0), ones)


def test_the_held_out_loss_falls_also_beside_corrections_of_single_layers() -> None:
    dense = tiny_random()
    for sharing in (recipe(LENS).sharing, ResidualSharing(matrices=("q", "up"), group_size=3, residual_rank=2)):
        made = compress(dense, replace(recipe(LENS), sharing=sharing), Workspace(Cache(None), QUIET))
        assert made.update["loss_after"] < made.update["loss_before"]
        assert 0 < made.update["changed"] <= made.update["directions"]


def test_what_cannot_work_is_said_before_any_work() -> None:
    data = Tokens().data()
    with pytest.raises(ModelError, match="cannot be run one at a time"):
        LENS.check(tiny_random("t5"), data)
    with pytest.raises(DataError, match="at least 2 calibration windows"):
        LENS.check(tiny_random(), replace(data, windows=replace(data.windows, ids=data.windows.ids[:1])))
    with pytest.raises(ConfigError, match="holdout must be above 0"):
        replace(LENS, holdout=0.0)
    assert updated(tiny_random(), LENS).update["strategy"] == "lens"
