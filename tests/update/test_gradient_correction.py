"""The correction is ZS-SVD's formula on the true gradient, keeps what is best on held-out text, and works in rounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bs_exp.cache import Cache
from bs_exp.calibration.site_inputs import inputs_of
from bs_exp.errors import ConfigError, DataError
from bs_exp.linalg.gradient_step import corrected_factors
from bs_exp.models.architecture import module_of, weight_of
from bs_exp.models.surgery import to_dense
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress
from bs_exp.progress import Progress
from bs_exp.schedule.steps import EqualSteps
from bs_exp.sharing.none import NoSharing
from bs_exp.testing.models import QUIET, Tokens, recipe, same, updated, values
from bs_exp.types import Metric, Task, WeightGroup
from bs_exp.update.chain import UpdateChain
from bs_exp.update.gradient_correction import GradientCorrection
from bs_exp.update.none import NoUpdate
from bs_exp.workspace import Workspace

CORRECTION = GradientCorrection(corrections=3, windows=None, ridge=1e-9, holdout=0.2, every_round=False, seed=0)
IDS = Tokens().windows(None).ids


def test_a_step_along_the_gradient_as_long_as_the_residual_reaches_along_it() -> None:
    random = torch.Generator().manual_seed(0)
    residual, product, gradient = (torch.randn(6, 9, generator=random, dtype=torch.float64) for _ in range(3))
    root = torch.randn(6, 6, generator=random, dtype=torch.float64).triu() + 3.0 * torch.eye(6, dtype=torch.float64)
    group = WeightGroup(matrix="up", layers=(0,), d_in=6, d_out=9)
    whole = corrected_factors(group, residual, product, gradient, Metric(whitener=root), 6)
    step = whole.basis @ whole.coefficients[0] - product
    assert float((gradient * step).sum()) == pytest.approx(float((gradient * residual).sum()))
    assert torch.linalg.matrix_norm(step / step[0, 0] - gradient / gradient[0, 0]) < 1e-9
    cut = corrected_factors(group, residual, product, gradient, Metric(whitener=root), 2)
    left, sizes, right = torch.linalg.svd(root @ (product + step), full_matrices=False)
    expected = torch.linalg.solve(root, left[:, :2] * sizes[:2] @ right[:2])
    torch.testing.assert_close(cut.basis @ cut.coefficients[0], expected, rtol=1e-9, atol=1e-9)
    still = corrected_factors(group, residual, product, torch.zeros_like(product), Metric(whitener=root), 6)
    torch.testing.assert_close(still.basis @ still.coefficients[0], product, rtol=1e-9, atol=1e-9)


def test_the_gradient_is_that_of_the_truncated_model() -> None:
    """Oracle: autograd and the inputs of an ordinary model that holds the products."""
    dense = tiny_random(layers=2)
    dense.module.double()
    one = replace(recipe(replace(CORRECTION, corrections=1, holdout=0.0)), sharing=NoSharing())
    cut = compress(dense, replace(one, update=NoUpdate()), Workspace(Cache(None), QUIET))
    made = compress(dense, one, Workspace(Cache(None), QUIET))
    plain, products = to_dense(cut.module), to_dense(made.module)
    with inputs_of(plain, {m.module: m.module for m in dense.architecture.matrices}) as seen:
        plain(IDS, labels=IDS).loss.backward()
    for planned in made.plan.groups:
        matrix = dense.architecture.by_position[planned.group.matrix, planned.group.layers[0]]
        weights = [weight_of(model, matrix).detach() for model in (dense.module, plain, products)]
        gradient = module_of(plain, matrix).weight.grad.T
        residual = weights[0] - weights[1]
        moved = weights[1] + (gradient * residual).sum() / gradient.square().sum() * gradient
        inputs = seen[matrix.module].detach()
        leading = torch.linalg.svd(inputs @ moved, full_matrices=False).Vh[: planned.rank]
        found, expected = inputs @ weights[2], inputs @ moved @ leading.mT @ leading
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_factors_of_the_least_held_out_loss_are_kept() -> None:
    dense = tiny_random()
    made = updated(dense, CORRECTION)
    losses, kept = made.update["held_out_loss"], made.update["kept"]
    assert len(losses) == 4 and losses[kept] == min(losses)
    last = updated(dense, replace(CORRECTION, corrections=max(kept, 1)))
    if kept:
        assert same(values(last.module), values(made.module))
    else:
        assert same(values(updated(dense, NoUpdate()).module), values(made.module))


def test_it_corrects_after_every_round_if_asked_to() -> None:
    dense = tiny_random()
    found = {}
    for every_round in (False, True):
        progress = Progress(quiet=True)
        update = replace(CORRECTION, corrections=1, windows=2, every_round=every_round)
        steps = replace(recipe(update), schedule=EqualSteps(size=0.25))
        made = compress(dense, steps, Workspace(Cache(None), progress))
        found[every_round] = (sum(note.startswith("correction:") for note in progress.notes), values(made.module))
        assert made.rounds == (0.75, 0.5)
    assert [count for count, _ in found.values()] == [1, 2]
    assert not same(found[False][1], found[True][1])


def test_what_cannot_work_is_said_before_any_work() -> None:
    data = Tokens().data()
    with pytest.raises(ConfigError, match="needs logits"):
        CORRECTION.check(replace(tiny_random("bert"), task=Task.ENCODER), data)
    with pytest.raises(DataError, match=r"at least 2 calibration windows.*set holdout=0"):
        CORRECTION.check(tiny_random(), replace(data, windows=replace(data.windows, ids=IDS[:1])))
    with pytest.raises(ConfigError, match=r"updates.it.every_round must be false"):
        UpdateChain(updates={"it": replace(CORRECTION, every_round=True)})
    with pytest.raises(ConfigError, match="corrections must be"):
        replace(CORRECTION, corrections=0)
