"""Updates of models with routed experts: what is paired are the same tokens, and what cannot be is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bs_exp.cache import Cache
from bs_exp.calibration.site_inputs import SiteInputs, inputs_of, same_tokens
from bs_exp.models.architecture import weight_of
from bs_exp.models.experts import unfused
from bs_exp.models.surgery import factors_of
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress
from bs_exp.progress import Progress
from bs_exp.sharing.none import NoSharing
from bs_exp.types import CompressedModel, LoadedModel
from bs_exp.update.refit import Refit
from bs_exp.workspace import Workspace
from tests.support.options import strategy
from tests.support.recipes import RECIPE, RandomTokens

TO_OUTPUTS = Refit(
    mode="one_shot", inputs="compressed", target="dense_outputs", beta=None, gram="layer", ridge=0.0, below=None
)
CALIBRATION = RandomTokens(count=16)


@pytest.fixture(scope="module")
def dense() -> LoadedModel:
    made = tiny_random("qwen3_moe", layers=2)
    made.module.double()
    return unfused(made)


def compressed(dense: LoadedModel, update: Any = None, progress: Progress | None = None) -> CompressedModel:
    changes = {} if update is None else {"update": update}
    recipe = replace(RECIPE, sharing=NoSharing(), calibration=CALIBRATION, **changes)
    return compress(dense, recipe, Workspace(Cache(None), progress or Progress(quiet=True)))


def read(module: Any, layer: int) -> tuple[Tensor, Tensor]:
    """What the experts of a layer read, and which of them every token is sent to, over all batches."""
    found: list[tuple[Tensor, ...]] = []
    experts = module.get_submodule(f"model.layers.{layer}.mlp.experts")
    handle = experts.register_forward_pre_hook(lambda module, given: found.append(given))
    with torch.no_grad():
        for ids in CALIBRATION.data().batches:
            module(ids)
    handle.remove()
    states, chosen = (torch.cat([given[i] for given in found]) for i in (0, 1))
    return states, chosen


def test_an_expert_is_refitted_on_the_tokens_that_both_models_send_to_it(dense: LoadedModel) -> None:
    """Oracle: least squares of the truncated model's inputs against the dense outputs, token by token."""
    plain, refitted = compressed(dense), compressed(dense, TO_OUTPUTS)
    states, chosen = read(plain.module, 1)
    wanted, dense_chosen = read(dense.module, 1)
    assert not torch.equal(chosen, dense_chosen)
    checked = 0
    for planned in plain.plan.groups:
        group = planned.group
        if not (group.matrix == "expert_gate" and group.blocks == (1,)):
            continue
        matrix = dense.architecture.by_position[group.matrix, group.layers[0]]
        number = torch.tensor(matrix.expert)
        both = torch.eq(chosen, number).any(1) & torch.eq(dense_chosen, number).any(1)
        before, after = (factors_of(m.module, dense.architecture, group) for m in (plain, refitted))
        assert torch.equal(before.basis, after.basis)
        rows, targets = states[both] @ before.basis, wanted[both] @ weight_of(dense.module, matrix).detach()
        best = torch.linalg.lstsq(rows, targets).solution
        torch.testing.assert_close(after.coefficients[group.layers[0]], best, rtol=1e-5, atol=1e-5)
        checked += 1
    assert checked == 4


@pytest.mark.parametrize("gram", ["layer", "group"])
def test_an_expert_with_too_few_tokens_of_its_own_is_left_as_it_is(dense: LoadedModel, gram: str) -> None:
    progress = Progress(quiet=True)
    few = RandomTokens(count=1)
    recipe = replace(RECIPE, sharing=NoSharing(), calibration=few)
    plain = compress(dense, recipe, Workspace(Cache(None), progress))
    update = replace(TO_OUTPUTS, gram=gram)
    refitted = compress(dense, replace(recipe, update=update), Workspace(Cache(None), progress))
    [note] = [note for note in progress.notes if "not refitted on tokens of their own" in note]
    assert note.startswith("refit: 24 matrices of routed experts")
    for planned in plain.plan.groups:
        before, after = (factors_of(m.module, dense.architecture, planned.group) for m in (plain, refitted))
        same = all(torch.equal(before.coefficients[i], after.coefficients[i]) for i in planned.group.layers)
        assert same or not planned.group.is_routed


def test_inputs_are_told_apart_by_token(dense: LoadedModel) -> None:
    other = compressed(dense).module
    sites = {"gate": "model.layers.1.mlp.experts.members.2.gate_layer", "q": "model.layers.1.self_attn.q_proj"}
    [ids, *_] = CALIBRATION.data().batches
    with torch.no_grad(), inputs_of(dense.module, sites) as one:
        dense.module(ids)
    with torch.no_grad(), inputs_of(other, sites) as two:
        other(ids)
    assert set(one.tokens) == {"gate"}
    assert len(one["gate"]) == len(one.tokens["gate"]) == len(one.tokens["gate"].unique())
    pair = same_tokens(one, two, "gate")
    assert pair is not None and len(pair[0]) == len(pair[1]) <= min(len(one["gate"]), len(two["gate"]))
    common = sorted(set(one.tokens["gate"].tolist()) & set(two.tokens["gate"].tolist()))
    for row, token in enumerate(common):
        for rows, seen in zip(pair, (one, two), strict=True):
            assert torch.equal(rows[row], seen["gate"][seen.tokens["gate"].tolist().index(token)])
    whole = same_tokens(one, two, "q")
    assert whole is not None and whole[0] is one["q"] and whole[1] is two["q"]
    assert same_tokens(one, SiteInputs(), "gate") is None


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("update=refit", None),
        ("update=refit update.mode=sequential update.gram=layer", None),
        ("update=mixed_refit", None),
        ("update=own_gram", None),
        ("update=lens", "lens: 24 matrices of routed experts keep the factors"),
        ("update=refine_blocks update.steps=2", None),
        ("update=refine_blocks update.steps=0 update.start=anchored", "refinement: 24 matrices of routed experts keep"),
        ("update=gradient_correction update.corrections=1", None),
        ("update=natural_gradient update.steps=1", None),
        ("update=recover update.steps=2", None),
        ("update=lora update.steps=2 update.rank=2", None),
    ],
)
def test_every_update_takes_them_or_says_that_it_does_not(row: str, told: str | None) -> None:
    progress, made = Progress(quiet=True), tiny_random("mixtral", layers=2)
    found = compressed(made, strategy(row), progress)
    with torch.no_grad():
        assert bool(found.module(torch.arange(24)[None]).logits.isfinite().all())
    assert any("routed experts keep" in note for note in progress.notes) is (told is not None)
    assert told is None or any(note.startswith(told) for note in progress.notes)


@pytest.mark.parametrize("inputs", ["sequential", "one_shot"])
def test_matrices_of_experts_are_stored_in_few_bits(inputs: str) -> None:
    made = tiny_random("mixtral", layers=2)
    precision = strategy(f"precision=int4 precision.inputs={inputs}")
    recipe = replace(RECIPE, sharing=NoSharing(), calibration=RandomTokens(count=1, batch_size=1), precision=precision)
    found = compress(made, recipe, Workspace(Cache(None), Progress(quiet=True)))
    assert found.precision["matrices"] == 2 * (4 + 3 * 4)
    assert 0.0 < found.precision["relative_error"] < 0.3
