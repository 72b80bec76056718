"""Training is a function of its recipe and the step, so that a run resumes exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bs_exp.demo.train import TrainingRecipe, shortest_run
from bs_exp.demo.training_data import Batches


def stream(length: int = 4000) -> Batches:
    ids = np.random.default_rng(0).integers(0, 4096, length).astype(np.uint16)
    return Batches(stream=ids, batch_size=4, length=32, seed=7)


def test_a_batch_depends_on_the_step_alone() -> None:
    first, again = stream().at(45), stream().at(45)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    inputs, targets = first
    assert inputs.shape == targets.shape == (4, 32) and torch.equal(inputs[:, 1:], targets[:, :-1])


def test_an_epoch_sees_every_window_once() -> None:
    batches = stream()
    rows = torch.cat([batches.at(step)[0] for step in range(batches.steps_per_epoch)])
    assert len(torch.unique(rows, dim=0)) == len(rows) == 4 * batches.steps_per_epoch
    assert not torch.equal(batches.at(0)[0], batches.at(batches.steps_per_epoch)[0])


def test_steps_do_not_matter_before_the_decay() -> None:
    short, long = TrainingRecipe(steps=1000), TrainingRecipe(steps=3000)
    assert [short.rate_at(step) for step in range(800)] == [long.rate_at(step) for step in range(800)]
    assert short.rate_at(999) < 0.01 * short.learning_rate and short.stable_settings() == long.stable_settings()


@pytest.mark.parametrize("done", [160, 801, 1000, 1919])
def test_the_shortest_run_decays_no_earlier_than_what_is_done(done: int) -> None:
    steps = shortest_run(done, 0.2)
    assert TrainingRecipe(steps=steps).decay_start >= done > TrainingRecipe(steps=steps - 1).decay_start


def test_too_short_a_stream_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="4 windows of 32 tokens, got 100"):
        stream(100)
