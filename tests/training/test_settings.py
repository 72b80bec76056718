"""What follows from a training's settings: the learning rate of each step, its windows, and those held out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bs_exp.errors import ConfigError
from bs_exp.training.settings import draw_batches, rate_factor, split_windows
from tests.support.updates import RECOVERY


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    settings = replace(RECOVERY, steps=100, warmup=0.1)
    rates = [rate_factor(step, settings) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == rates[10] == 1.0 and 0.0 < rates[-1] < 0.001
    assert rate_factor(55, replace(settings, schedule="linear")) == pytest.approx(0.5)
    assert rate_factor(99, replace(settings, schedule="constant")) == 1.0


def test_every_training_window_is_seen_once_per_epoch_and_no_held_out_one() -> None:
    ids = torch.arange(10)[:, None].expand(10, 4)
    training, held_out = split_windows(ids, RECOVERY)
    assert sorted([*training[:, 0].tolist(), *held_out[:, 0].tolist()]) == list(range(10)) and len(held_out) == 2
    epochs = draw_batches(8, RECOVERY).flatten().view(-1, 8)
    assert all(sorted(epoch.tolist()) == list(range(8)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_no_steps_have_no_batches() -> None:
    assert draw_batches(8, replace(RECOVERY, steps=0)).shape == (0, RECOVERY.batch_size)


def test_more_passes_than_windows_in_a_step_are_refused() -> None:
    assert replace(RECOVERY, batch_size=5, accumulation=5).accumulation == 5
    with pytest.raises(ConfigError, match=r"^accumulation must be at most batch_size, which is 2, .* got 5\."):
        replace(RECOVERY, batch_size=2, accumulation=5)
