"""Every step is the formula on the true gradient, lowers the held-out loss, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bs_exp import processes
from bs_exp.cache import Cache
from bs_exp.calibration.site_inputs import inputs_of
from bs_exp.corpora.sampling import hold_out
from bs_exp.errors import ConfigError, DataError
from bs_exp.linalg.cholesky import definite
from bs_exp.linalg.natural_gradient import Curvature, Line, basis_direction, natural_gradient
from bs_exp.models.architecture import module_of
from bs_exp.models.surgery import factors_of, to_dense
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress
from bs_exp.progress import Progress
from bs_exp.protocols import Layout
from bs_exp.testing.models import LAYOUTS, QUIET, Tokens, recipe, same, updated, values
from bs_exp.types import Task
from bs_exp.update.gradient_correction import GradientCorrection
from bs_exp.update.natural_gradient import NaturalGradient
from bs_exp.update.none import NoUpdate
from bs_exp.workspace import Workspace
from tests.support.options import strategy

DESCENT = NaturalGradient(
    loss="labels", steps=3, windows=8, ridge=0.01, damping=1.0, holdout=0.25, first_length=0.25, seed=0
)
IDS = Tokens().windows(None).ids


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad.T


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_step_is_the_formula_on_the_gradient_of_the_compressed_model(layout: Layout) -> None:
    """Oracle: autograd, inputs and output gradients of an ordinary model that holds the products."""
    dense = tiny_random(layers=2)
    dense.module.double()
    one = recipe(replace(DESCENT, steps=1, windows=None), layout)
    cut = compress(dense, replace(one, update=NoUpdate()), Workspace(Cache(None), QUIET))
    made = compress(dense, one, Workspace(Cache(None), QUIET))
    [length] = made.update["lengths"]
    ids = IDS[hold_out(len(IDS), DESCENT.holdout, DESCENT.seed)[0]]
    plain = to_dense(cut.module)
    gradients: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, outputs: gradients.__setitem__(name, outputs[0].flatten(0, -2))

    for matrix in dense.architecture.matrices:
        module_of(plain, matrix).register_full_backward_hook(keep(matrix.module))
    with inputs_of(plain, {m.module: m.module for m in dense.architecture.matrices}) as seen:
        logits = plain(ids).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    predictions = ids.numel() - len(ids)
    for planned in made.plan.groups:
        group = planned.group
        matrices = [dense.architecture.by_position[group.matrix, layer] for layer in group.layers]
        inputs = torch.cat([seen[matrix.module].detach() for matrix in matrices])
        gram = inputs.mT @ inputs / len(inputs)
        outputs = {
            m.layer: definite(gradients[m.module].mT @ gradients[m.module] / predictions, ridge=1.0, of="outputs")
            for m in matrices
        }
        curvature = Curvature(definite(gram, ridge=0.01, of="inputs"), outputs)
        gradient = torch.cat([_gradient(module_of(plain, matrix).weight) for matrix in matrices], dim=1) / predictions
        direction = natural_gradient(group, gradient, curvature)
        stored = factors_of(cut.module, dense.architecture, group)
        start = stored.layout.restore(stored)
        steps = direction, basis_direction(start, direction, curvature)
        wanted = Line.through(start, *steps, curvature.inputs).at(length, start)
        stored = factors_of(made.module, dense.architecture, group)
        found = stored.layout.restore(stored)
        for layer in group.layers:
            # Gradients and directions are kept in fp32.
            product = found.basis @ found.coefficients[layer]
            moved = product - start.basis @ start.coefficients[layer]
            expected = wanted.basis @ wanted.coefficients[layer] - start.basis @ start.coefficients[layer]
            torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_every_step_lowers_the_held_out_loss() -> None:
    dense, settings = tiny_random(), replace(DESCENT, windows=None)
    made = updated(dense, settings)
    losses, lengths = made.update["held_out_loss"], made.update["lengths"]
    assert made.update["steps"] == len(lengths) == len(losses) - 1 == 3
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == len(losses)
    held = IDS[hold_out(len(IDS), DESCENT.holdout, DESCENT.seed)[1]]
    with torch.no_grad():
        assert float(made.module(held, labels=held).loss) == pytest.approx(losses[-1], rel=1e-5)
    again = updated(dense, settings)
    assert same(values(made.module), values(again.module))


def test_directions_depend_on_those_before() -> None:
    dense = tiny_random()
    first, both = (updated(dense, replace(DESCENT, steps=steps)) for steps in (1, 2))
    assert first.update["held_out_loss"] == both.update["held_out_loss"][:2]
    start = updated(dense, NoUpdate())
    assert not same(values(first.module), values(start.module))


def test_of_all_that_it_makes_only_the_result_stays_in_the_cache(tmp_path: Path) -> None:
    found = {}
    for name, update in (("without", NoUpdate()), ("with", DESCENT)):
        made = updated(tiny_random(), update, Cache(tmp_path / name, keep_rounds=False))
        found[name] = sorted(path.parent.name for path in (tmp_path / name).rglob("*.safetensors"))
    more = [kind for kind in found["with"] if kind == "natural_gradient"]
    assert found["with"] == sorted(found["without"] + more)
    # The factors of each group, and the report.
    assert len(more) == sum(planned.rank is not None for planned in made.plan.groups) + 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("sharing", [None, "sharing=residual"])
def test_a_finished_update_is_not_repeated(tmp_path: Path, layout: Layout, sharing: str | None) -> None:
    dense, one = tiny_random(), recipe(replace(DESCENT, steps=2), layout)
    if sharing is not None:
        one = replace(one, sharing=strategy(sharing))
    first = compress(dense, one, Workspace(Cache(tmp_path), QUIET))
    progress = Progress(quiet=True)
    again = compress(dense, one, Workspace(Cache(tmp_path), progress))
    assert "natural gradient: the factors after 2 steps came from the cache" in progress.notes
    assert same(values(first.module), values(again.module))
    assert first.update == again.update
    ids = IDS[:2]
    with torch.no_grad():
        assert torch.equal(first.module(ids).logits, again.module(ids).logits)
    for other, cache in (
        (replace(one, update=replace(DESCENT, steps=2, damping=0.5)), Cache(tmp_path)),
        (one, Cache(tmp_path, dtype="float32")),
    ):
        progress = Progress(quiet=True)
        compress(dense, other, Workspace(cache, progress))
        assert not any("the factors after" in note for note in progress.notes)


@pytest.mark.parametrize("lost", ["report", "group"])
def test_a_result_that_is_not_whole_is_made_again(tmp_path: Path, lost: str) -> None:
    dense, one = tiny_random(), recipe(replace(DESCENT, steps=1))
    first = compress(dense, one, Workspace(Cache(tmp_path), QUIET))
    files = sorted((tmp_path / "natural_gradient").iterdir(), key=lambda path: path.stat().st_size)
    (files[0] if lost == "report" else files[-1]).write_bytes(b"damaged")
    progress = Progress(quiet=True)
    again = compress(dense, one, Workspace(Cache(tmp_path), progress))
    assert not any("the factors after" in note for note in progress.notes)
    assert same(values(first.module), values(again.module))


def test_where_nothing_helps_the_factors_stay() -> None:
    dense = tiny_random()
    # No length at which the factors would hold anything finite.
    made = updated(dense, replace(DESCENT, first_length=1e30))
    assert made.update["steps"] == 0
    assert same(values(made.module), values(updated(dense, NoUpdate()).module))


@pytest.mark.parametrize("otherwise", [None, "update=mixed_refit"])
def test_a_model_without_a_loss_gets_another_update(otherwise: str | None) -> None:
    dense = replace(tiny_random("bert"), task=Task.ENCODER)
    other = strategy(otherwise) if otherwise else None
    progress = Progress(quiet=True)
    made = compress(dense, recipe(replace(DESCENT, otherwise=other)), Workspace(Cache(None), progress))
    wanted = updated(dense, other or NoUpdate())
    assert same(values(made.module), values(wanted.module))
    told = f"natural gradient: this model has no loss of its own; {'Refit instead' if other else 'its factors stay'}"
    assert told in progress.notes


def test_what_cannot_work_is_said_before_any_work() -> None:
    data = Tokens().data()
    with pytest.raises(DataError, match=r"at least 2 calibration windows.*got 1.*update=mixed_refit"):
        DESCENT.check(tiny_random(), replace(data, windows=replace(data.windows, ids=IDS[:1])))
    with pytest.raises(ConfigError, match="otherwise must be an update"):
        replace(DESCENT, otherwise=5)  # type: ignore[arg-type]
    for wrong in (
        {"steps": 0},
        {"windows": 0},
        {"ridge": -1.0},
        {"damping": -1.0},
        {"first_length": 0.0},
        {"holdout": 0.0},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            replace(DESCENT, **wrong)


@pytest.mark.parametrize(
    "update",
    [
        replace(DESCENT, holdout=0.5),
        GradientCorrection(corrections=1, windows=None, ridge=1e-9, holdout=0.5, every_round=False, seed=0),
    ],
    ids=lambda update: type(update).__name__,
)
def test_every_process_needs_a_window_that_is_not_held_out(
    update: NaturalGradient | GradientCorrection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer, one process would have no batch, and the others would wait for it."""
    data = Tokens(batch_size=1).data()
    few, enough = (replace(data, windows=replace(data.windows, ids=IDS[:count])) for count in (5, 8))
    monkeypatch.setattr(processes, "count", lambda: 4)
    with pytest.raises(DataError, match=r"as there are processes \(4\), got 5\. Raise calibration.num_sequences"):
        update.check(tiny_random(), few)
    update.check(tiny_random(), enough)
