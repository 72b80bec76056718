"""Blocks learn the dense block's outputs, one after the other, never for the worse, whatever interrupts them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bs_exp.cache import Cache
from bs_exp.calibration.site_inputs import inputs_of
from bs_exp.errors import ConfigError, DataError, ModelError
from bs_exp.models.architecture import weight_of
from bs_exp.models.loading import LocalModel
from bs_exp.models.offload import keep_changes, place, resident
from bs_exp.models.saving import save_model
from bs_exp.models.surgery import find_factors, to_dense
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress
from bs_exp.sharing.none import NoSharing
from bs_exp.testing.models import QUIET, Tokens, recipe, same, updated, values
from bs_exp.training.settings import split_windows
from bs_exp.types import CompressedModel, LoadedModel
from bs_exp.update.none import NoUpdate
from bs_exp.update.refine_blocks import RefineBlocks
from bs_exp.whitening.identity import IdentityWhitening
from bs_exp.workspace import Workspace
from tests.support.regression import reduced_rank
from tests.support.updates import Interrupting

REFINE = RefineBlocks(
    trained="block",
    start="present",
    ridge=0.0,
    steps=8,
    batch_size=4,
    accumulation=2,
    optimizer="adamw",
    precondition_frequency=1,
    max_precond_dim=0,
    learning_rate=0.01,
    schedule="cosine",
    warmup=0.1,
    weight_decay=0.0,
    clip_norm=1.0,
    autocast="none",
    holdout=0.2,
    evaluate_every=4,
    patience=None,
    checkpoint_minutes=None,
    seed=0,
)
ANCHORED = replace(REFINE, start="anchored", steps=0)
IDS = Tokens().windows(None).ids


def alone(dense: LoadedModel, update: Any, **changes: Any) -> CompressedModel:
    """Half the parameters, without sharing."""
    return compress(dense, replace(recipe(update), sharing=NoSharing(), **changes), Workspace(Cache(None), QUIET))


def states_of(module: Any) -> list[Tensor]:
    """Hidden states in front of every block; the last entry is behind the final norm."""
    with torch.no_grad():
        return [state.double() for state in module.model(IDS, output_hidden_states=True).hidden_states]


def test_the_best_of_a_linear_block_is_found() -> None:
    """One block of which `down` alone has factors: what they lack is linear, and least squares gives the optimum."""
    dense = tiny_random(layers=1)
    dense.module.double()
    (down,) = dense.architecture.of_type("down")
    dense = replace(dense, architecture=replace(dense.architecture, matrices=(down,)))
    long = replace(REFINE, trained="factors", steps=300, holdout=0.0, learning_rate=0.03, clip_norm=None)
    plain = alone(dense, NoUpdate(), whitening=IdentityWhitening())
    made = alone(dense, replace(long, batch_size=16), whitening=IdentityWhitening())
    with inputs_of(dense.module, {"down": down.module}) as seen, torch.no_grad():
        dense.module(IDS)
    weight, rank = weight_of(dense.module, down).detach(), made.plan.groups[0].rank
    assert rank is not None
    best = seen["down"] @ (reduced_rank(seen["down"], seen["down"] @ weight, rank) - weight)

    @torch.no_grad()
    def error(model: CompressedModel) -> float:
        return float((seen["down"] @ (weight_of(to_dense(model.module), down) - weight)).square().sum())

    optimum = float(best.square().sum())
    assert error(plain) > 1.2 * optimum
    assert (1.0 - 1e-9) * optimum <= error(made) <= 1.02 * optimum


def test_matrices_are_truncated_on_what_the_truncated_ones_before_give() -> None:
    """Oracle: reduced-rank regression on the inputs in the finished model, which are those of every matrix's turn."""
    dense = tiny_random(layers=2)
    dense.module.double()
    made = alone(dense, ANCHORED)
    names = {m.module: m.module for m in dense.architecture.matrices}
    with torch.no_grad():
        with inputs_of(dense.module, names) as wanted:
            dense.module(IDS)
        with inputs_of(made.module, names) as seen:
            made.module(IDS)
    products = to_dense(made.module)
    for planned in made.plan.groups:
        matrix = dense.architecture.by_position[planned.group.matrix, planned.group.layers[0]]
        assert planned.rank is not None
        outputs = wanted[matrix.module] @ weight_of(dense.module, matrix).detach()
        expected = seen[matrix.module] @ reduced_rank(seen[matrix.module], outputs, planned.rank)
        # The outputs, not the matrices: what o reads spans fewer directions than it has channels.
        found = seen[matrix.module] @ weight_of(products, matrix).detach()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert made.update["steps"] == 0
    assert all(b["truncation_loss_after"] <= b["truncation_loss_before"] for b in made.update["blocks"])


def test_reported_errors_are_those_of_the_finished_model() -> None:
    """Oracle: the models' own hidden states; what a block learned does not depend on blocks behind it."""
    dense = tiny_random()
    made = updated(dense, REFINE)
    _, held_out = split_windows(torch.arange(len(IDS))[:, None], REFINE)
    ours, theirs = states_of(made.module), states_of(dense.module)
    for layer, block in enumerate(made.update["blocks"][:2]):
        unit = (theirs[layer + 1] - theirs[layer]).square().sum() / len(IDS)
        lost = (ours[layer + 1] - theirs[layer + 1])[held_out.flatten()].square().sum() / len(held_out)
        assert block["held_out_error_after"] == pytest.approx(float(lost / unit), rel=1e-4)
    assert made.update["held_out_error_after"] < made.update["held_out_error_before"]


def test_shared_bases_stay_and_everything_else_of_a_block_is_trained(tmp_path: Path) -> None:
    """With biases of zeros in it; what is saved is what was trained."""
    dense = tiny_random("gpt2")
    plain, made = updated(dense, NoUpdate()), updated(dense, replace(REFINE, holdout=0.0))
    before, after = values(plain.module), values(made.module)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    shared = {name for name, layer in made.module.named_modules() if hasattr(layer, "basis")}
    held = [
        name
        for name in shared
        if sum(made.module.get_submodule(o).basis is made.module.get_submodule(name).basis for o in shared) > 1
    ]
    assert held and not any(f"{name}.basis" in changed for name in held)
    inside = {name for name, p in made.module.named_parameters() if name.startswith("transformer.h.") and p.numel()}
    assert inside - changed == {name for name in inside if name.removesuffix(".basis") in held}
    assert any("ln_1" in name for name in changed) and any(name.endswith(".bias") for name in changed)
    folder = save_model(made.module, dense.tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, made.module(IDS).logits)


def test_training_that_does_harm_leaves_the_model_as_it_was() -> None:
    dense = tiny_random()
    harmful = replace(REFINE, learning_rate=0.5, warmup=0.0, clip_norm=None, schedule="constant")
    made = updated(dense, harmful)
    assert same(values(made.module), values(updated(dense, NoUpdate()).module))
    assert {block["best_step"] for block in made.update["blocks"]} == {0}


def test_an_interrupted_refinement_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    dense, update = tiny_random(), replace(REFINE, start="anchored", checkpoint_minutes=0.0, ridge=1e-6)
    whole = updated(dense, update)
    with pytest.raises(KeyboardInterrupt):
        compress(dense, recipe(update), Workspace(Cache(tmp_path), Interrupting(label=None, steps=5)))
    resumed = compress(dense, recipe(update), Workspace(Cache(tmp_path), QUIET))
    assert same(values(whole.module), values(resumed.module))


def test_weights_that_wait_on_disk_are_refined_to_the_same_bits(tmp_path: Path) -> None:
    model = tiny_random()
    model.module.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    made = []
    for offload in ("none", "disk"):
        source = LocalModel(path=str(tmp_path / "model"), dtype="auto", device="cpu", offload=offload)
        cache = Cache(tmp_path / offload)
        made.append(
            compress(source.load(), recipe(replace(REFINE, start="anchored", ridge=1e-6)), Workspace(cache, QUIET))
        )
    assert same(*(values(model.module) for model in made))


def test_what_a_resident_block_learned_goes_to_where_it_waits() -> None:
    """A block whose weights wait elsewhere: here a copy of them stands for the device's."""
    dense = tiny_random()
    block = dense.module.get_submodule(dense.architecture.blocks[0])
    weight = next(block.parameters())
    place(dense.module, dense.architecture.blocks, torch.device("cpu"))
    with resident(block):
        home = weight.data
        vars(block)["_bs_exp_residence"].home.append((weight, home))
        weight.data = home + 1.0
        keep_changes(block)
        learned = weight.data.clone()
    assert torch.equal(weight.data, learned) and torch.equal(home, learned)
    assert weight.data.data_ptr() == home.data_ptr()


def test_what_cannot_work_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Tokens().data()
    with pytest.raises(ModelError, match=r"cannot be run one at a time.*use update=recover"):
        REFINE.check(tiny_random("t5"), data)
    with pytest.raises(DataError, match="at least 2 calibration windows"):
        REFINE.check(tiny_random(), replace(data, windows=replace(data.windows, ids=IDS[:1])))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ConfigError, match=r"needs .* GB beside the model .*Set calibration.activations=disk"):
        REFINE.check(tiny_random(), data)
    with pytest.raises(ConfigError, match="trained must be"):
        replace(REFINE, trained="norms")
    with pytest.raises(ConfigError, match="start must be"):
        replace(REFINE, start="dense")


def test_of_nothing_asked_nothing_is_done() -> None:
    dense = tiny_random()
    made = updated(dense, replace(REFINE, steps=0))
    assert same(values(made.module), values(updated(dense, NoUpdate()).module)) and made.update["steps"] == 0
    assert find_factors(made.module)
