"""The trainer alone, on parameters of its own: passes, early stop, and a training that continues."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bs_exp.cache import Cache, MemoryEntry
from bs_exp.testing.models import QUIET
from bs_exp.training.trainer import Trainer
from bs_exp.workspace import Workspace
from tests.support.updates import RECOVERY

IDS = torch.arange(12)[:, None]


def trainer(
    objective: Any,
    parameters: dict[str, nn.Parameter],
    held_out: Tensor = IDS[:0],
    stored: Mapping[str, torch.dtype] | None = None,
    **changes: Any,
) -> Trainer:
    return Trainer(
        name="Test",
        settings=replace(RECOVERY, learning_rate=0.1, clip_norm=None, **changes),
        parameters=parameters,
        step_scales=dict.fromkeys(parameters, 1.0),
        objective=objective,
        windows=IDS,
        held_out=held_out,
        device=torch.device("cpu"),
        scale_loss=False,
        stored=stored or {},
    )


def test_a_parameter_without_gradients_does_not_keep_a_training_from_going_on() -> None:
    used, unused = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))

    def training() -> Trainer:
        return trainer(lambda ids, training: used.square().sum(), {"used": used, "unused": unused})

    first = training()
    first.step(torch.zeros(1, 1), 1.0)
    state = {name: value.clone() for name, value in first.state().items()}
    first.step(torch.zeros(1, 1), 1.0)
    expected = used.detach().clone()
    second = training()
    second.resume(MemoryEntry(state))
    second.step(torch.zeros(1, 1), 1.0)
    assert second.done == 2 and torch.equal(used, expected)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "passes"),
    [(4, 1, [4]), (4, 2, [2, 2]), (4, 3, [2, 1, 1]), (5, 2, [3, 2]), (5, 4, [2, 1, 1, 1]), (3, 3, [1, 1, 1])],
)
def test_a_step_has_as_many_passes_as_asked_for(batch_size: int, accumulation: int, passes: list[int]) -> None:
    seen, parameter = [], nn.Parameter(torch.ones(2))

    def objective(ids: Tensor, training: bool) -> Tensor:
        seen.append(len(ids))
        return (parameter.sum() - ids.float()).square().sum()

    made = trainer(objective, {"p": parameter}, batch_size=batch_size, accumulation=accumulation)
    assert made.step(IDS[:batch_size], 1.0) == pytest.approx(sum((2 - i) ** 2 for i in range(batch_size)) / batch_size)
    assert seen == passes


@pytest.mark.parametrize("stored", [False, True], ids=["at once", "found in the cache"])
def test_after_an_early_stop_windows_that_no_step_saw_are_not_counted(stored: bool, tmp_path: Any) -> None:
    """Oracle: the windows that the objective was given."""
    seen: set[int] = set()

    def objective(ids: Tensor, training: bool) -> Tensor:
        if training:
            seen.update(ids[:, 0].tolist())
        return parameter.square().sum() if training else (parameter - 1.0).square().sum()

    for _ in range(1 + stored):
        parameter = nn.Parameter(torch.ones(2))
        made = trainer(objective, {"p": parameter}, IDS[:2], steps=100, batch_size=1, evaluate_every=2, patience=2)
        made.train(Workspace(Cache(tmp_path), QUIET), label="test", kind="test", key="key")
    assert (made.done, made.best_step, made.finished) == (4, 0, True)
    assert set(made.seen.tolist()) == seen and made.report()["training_windows"] == len(seen) == 4
    assert torch.equal(parameter.detach(), torch.ones(2))


def test_parameters_are_measured_as_they_will_be_stored() -> None:
    """In bf16, of steps that are smaller than its unit, which add up in fp32."""
    parameter = nn.Parameter(torch.ones(2))
    training = trainer(lambda ids, training: parameter.sum(), {"p": parameter}, stored={"p": torch.bfloat16})
    values = []
    for _ in range(200):
        training.step(torch.zeros(1, 1), 1e-3)
        assert torch.equal(parameter, parameter.bfloat16().float())
        values.append(float(parameter.detach()[0]))
    assert values[0] == 1.0 and values[-1] < 1.0
    assert parameter.dtype == torch.float32
