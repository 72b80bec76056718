"""LoRA trains one adapter per factor and nothing else; merged or kept, the model is the one that was trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bs_exp.cache import Cache
from bs_exp.errors import ConfigError, DataError, ModelError
from bs_exp.evaluation.size import measure_size
from bs_exp.models.adapters import adapted_twin, has_adapters, without_adapters
from bs_exp.models.saving import ADAPTER_FOLDER, save_model
from bs_exp.models.surgery import find_factors, to_dense
from bs_exp.models.tiny import TinyRandom, tiny_random
from bs_exp.pipeline import compress, prepare
from bs_exp.progress import Progress
from bs_exp.protocols import Layout
from bs_exp.records.record import read_record
from bs_exp.testing.models import LAYOUTS, QUIET, Tokens, recipe, same, updated, values
from bs_exp.training.settings import split_windows
from bs_exp.types import Task
from bs_exp.update.lora import KIND, LoRA
from bs_exp.update.none import NoUpdate
from bs_exp.workspace import Workspace
from tests.support.updates import Interrupting

LORA = LoRA(
    factors="both",
    matrices=None,
    rank=3,
    alpha=12.0,
    dropout=0.0,
    loss="distillation",
    temperature=1.0,
    merge=True,
    data=None,
    steps=8,
    batch_size=4,
    accumulation=1,
    learning_rate=0.02,
    schedule="linear",
    warmup=0.1,
    weight_decay=0.0,
    clip_norm=1.0,
    autocast="none",
    holdout=0.2,
    evaluate_every=2,
    patience=None,
    checkpoint_minutes=None,
    seed=0,
)
IN_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


@IN_LAYOUTS
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "float32"), ("gpt2", "float32"), ("llama", "bfloat16"), ("llama", "float16")]
)
def test_loss_falls_and_every_factor_changes(family: str, dtype: str, layout: Layout) -> None:
    dense = TinyRandom(family=family, dtype=dtype).load()
    plain, made = updated(dense, NoUpdate(), layout=layout), updated(dense, LORA, layout=layout)
    assert made.update["held_out_loss_after"] < 0.99 * made.update["held_out_loss_before"]
    old = values(plain.module)
    assert all(not torch.equal(factor, old[name]) for name, factor in find_factors(made.module).items())
    assert {p.dtype for p in made.module.parameters()} == {dense.module.dtype}


def test_the_change_of_a_factor_is_of_the_adapters_rank() -> None:
    dense = tiny_random()
    plain, made = updated(dense, NoUpdate()).module, updated(dense, LORA).module
    for name, factor in find_factors(made).items():
        change = (factor - plain.get_parameter(name)).detach().double()
        spectrum = torch.linalg.svdvals(change)
        assert spectrum[2] > 1e-6 and bool((spectrum[3:] < 1e-5 * spectrum[0]).all()), name


def test_the_reported_loss_is_that_of_the_result() -> None:
    """Oracles: the model's own loss on the held-out windows, and the KL by torch's own categorical distributions."""
    dense = tiny_random()
    _, held_out = split_windows(Tokens().windows(None).ids, LORA)
    text = updated(dense, replace(LORA, loss="cross_entropy"))
    with torch.no_grad():
        assert text.update["held_out_loss_after"] == pytest.approx(
            text.module(held_out, labels=held_out).loss.item(), rel=1e-5
        )
        made = updated(dense, LORA)
        ours, theirs = (torch.distributions.Categorical(logits=m(held_out).logits) for m in (dense.module, made.module))
    measured = float(torch.distributions.kl_divergence(ours, theirs).mean())
    assert made.update["held_out_loss_after"] == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "kinds", "matrices"),
    [
        ({"factors": "coefficients"}, {"weight"}, {"q", "k", "v", "o", "gate", "up", "down"}),
        ({"factors": "basis"}, {"basis"}, {"q", "k", "v", "o", "gate", "up", "down"}),
        (
            {"factors": "coefficients", "matrices": ["q", "v"]},
            {"weight"},
            {"q", "v"},
        ),  # the official Basis Sharing code
    ],
    ids=["coefficients", "basis", "q and v"],
)
def test_what_is_trained_is_a_dial(changes: dict[str, Any], kinds: set[str], matrices: set[str]) -> None:
    dense = tiny_random()
    plain, made = updated(dense, NoUpdate()), updated(dense, replace(LORA, **changes))
    roles = {m.module: m.matrix for m in dense.architecture.matrices}
    old = values(plain.module)
    changed = [name.rpartition(".") for name, value in values(made.module).items() if not torch.equal(value, old[name])]
    assert {kind for _, _, kind in changed} == kinds
    assert {roles[module] for module, _, _ in changed} == matrices
    assert made.update["held_out_loss_after"] < made.update["held_out_loss_before"]


@IN_LAYOUTS
def test_kept_adapters_are_the_merged_ones(layout: Layout) -> None:
    dense, ids = tiny_random(), torch.arange(20)[None]
    merged, kept = (updated(dense, replace(LORA, merge=merge), layout=layout) for merge in (True, False))
    assert has_adapters(kept.module) and not has_adapters(merged.module)
    with torch.no_grad():
        torch.testing.assert_close(kept.module(ids).logits, merged.module(ids).logits, rtol=1e-4, atol=1e-4)
    bare, plain = without_adapters(kept.module), updated(dense, NoUpdate(), layout=layout)
    assert same(values(bare), values(plain.module)) and has_adapters(kept.module)
    # Counted once for each factor, and on top of the budget.
    sizes = [measure_size(dense, made, made.plan)["targeted_parameters"] for made in (kept, plain)]
    assert sizes[0] == sizes[1] + kept.update["trained_parameters"]
    with pytest.raises(ModelError, match="carries adapters beside its factors"):
        to_dense(kept.module)


@IN_LAYOUTS
@pytest.mark.parametrize(("dtype", "rank"), [("float32", 3), ("float32", 12), ("bfloat16", 3)])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_a_saved_adapter_loads_with_plain_peft(dtype: str, rank: int, layout: Layout, tmp_path: Path) -> None:
    """At rank 12 some adapters have the smaller rank of their factor."""
    dense, ids = TinyRandom(dtype=dtype).load(), torch.arange(20)[None]
    made = updated(dense, replace(LORA, merge=False, rank=rank), layout=layout)
    assert (made.update["clipped_adapters"] > 0) == (rank == 12)
    folder = save_model(made.module, dense.tokenizer, tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert same(values(base), values(updated(dense, NoUpdate(), layout=layout).module))
    adapted = PeftModel.from_pretrained(base, folder / ADAPTER_FOLDER)
    with torch.no_grad():
        assert torch.equal(adapted(ids).logits, made.module(ids).logits)


@IN_LAYOUTS
def test_a_twin_with_fresh_adapters_is_the_same_model(layout: Layout) -> None:
    module, ids = updated(tiny_random(), NoUpdate(), layout=layout).module, torch.arange(20)[None]
    twin = adapted_twin(module, find_factors(module), rank=2, alpha=4.0, dropout=0.5, seed=0)
    assert twin.adapters.keys() == find_factors(module).keys()
    with torch.no_grad():
        torch.testing.assert_close(twin.module(ids).logits, module(ids).logits)
        for adapter in twin.adapters.values():
            adapter.up.normal_(std=0.1)
        once, again = twin.module(ids).logits, twin.module(ids).logits
        twin.set_dropout(True)
        assert torch.equal(once, again) and not torch.allclose(once, twin.module(ids).logits, atol=1e-2)
        twin.set_dropout(False)
        for adapter in twin.adapters.values():
            adapter.merge()
        torch.testing.assert_close(module(ids).logits, once, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{"dropout": 0.2}, {"holdout": 0.0}, {"loss": "cross_entropy"}], ids=repr)
def test_an_interrupted_training_goes_on_to_the_same_bits(changes: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny_random()
    update = replace(LORA, checkpoint_minutes=0.0, **changes)
    whole = updated(dense, update)
    for steps in (3, 2):
        with pytest.raises(KeyboardInterrupt):
            compress(dense, recipe(update), Workspace(Cache(tmp_path), Interrupting(steps=steps)))
    progress = Progress(quiet=True)
    resumed = compress(dense, recipe(update), Workspace(Cache(tmp_path), progress))
    assert "lora: 5 of 8 steps came from the cache" in progress.notes
    assert same(values(whole.module), values(resumed.module))
    assert all(p.requires_grad and p.grad is None for p in dense.module.parameters())
    again = compress(dense, recipe(replace(update, merge=False)), Workspace(Cache(tmp_path), Interrupting(steps=0)))
    assert again.update["steps"] == 8 and len(list((tmp_path / KIND).iterdir())) == 1


def test_without_held_out_windows_the_last_adapters_are_taken() -> None:
    made = updated(tiny_random(), replace(LORA, holdout=0.0))
    assert made.update["training_windows"] == 16 and made.update["held_out_windows"] == 0
    assert made.update["best_step"] == 8 and "held_out_loss_after" not in made.update


@pytest.mark.parametrize("merge", [True, False])
def test_training_that_does_harm_is_left_out(merge: bool) -> None:
    dense, progress = tiny_random(), Progress(quiet=True)
    harmful = replace(LORA, learning_rate=0.5, warmup=0.0, clip_norm=None, patience=2, merge=merge)
    made = compress(dense, recipe(harmful), Workspace(Cache(None), progress))
    assert same(values(made.module), values(updated(dense, NoUpdate()).module))
    assert made.update["training_windows"] == 13  # all that there are, within 4 steps of 4
    assert made.update["steps"] == 4 and any("stay as they were" in note for note in progress.notes)


def test_gains_that_rounding_takes_away_are_left_out() -> None:
    """bfloat16 holds no changes as small as these."""
    dense = TinyRandom(dtype="bfloat16").load()
    made = updated(dense, replace(LORA, learning_rate=1e-7, schedule="constant"))
    assert made.update["held_out_loss_after"] <= made.update["held_out_loss_before"]


def test_other_text_may_be_trained_on() -> None:
    dense = tiny_random()
    made = updated(dense, replace(LORA, data=Tokens(count=10)))
    assert made.update["windows"]["sha256"] == "tokens-10" and made.update["training_windows"] == 8
    assert made.calibration["sha256"] == "tokens-16"


@pytest.mark.parametrize("changes", [{"steps": 0}, {}], ids=["no steps", "a dense model"])
def test_nothing_to_do(changes: dict[str, Any]) -> None:
    dense = tiny_random()
    ratio = 0.5 if changes else 1.0
    made = compress(dense, replace(recipe(replace(LORA, **changes)), retain_ratio=ratio), Workspace(Cache(None), QUIET))
    assert made.update["steps"] == 0 and not has_adapters(made.module)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"matrices": ["q", "qkv"]}, ConfigError, r"^update\.matrices must name some of q, k.*got \['q', 'qkv'\]"),
        ({"matrices": []}, ConfigError, r"^update\.matrices must name some of"),
        ({"data": Tokens(count=1)}, DataError, r"at least 2"),
    ],
    ids=repr,
)
def test_requests_that_cannot_be_served_fail_before_any_work(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        prepare(tiny_random(), recipe(replace(LORA, **changes)), QUIET)


def test_a_model_without_logits_has_nothing_to_train_on() -> None:
    dense = replace(tiny_random("bert"), task=Task.ENCODER)
    with pytest.raises(ConfigError, match="logits"):
        prepare(dense, recipe(LORA), QUIET)


@IN_LAYOUTS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapted_twin_holds_every_parameter_of_the_model(family: str, layout: Layout) -> None:
    """Biases too, which peft freezes with the rest."""
    plain = updated(tiny_random(family), NoUpdate(), layout=layout).module
    adapted = adapted_twin(plain, find_factors(plain), rank=2, alpha=4.0, dropout=0.0, seed=0)
    assert {id(p) for p in plain.parameters() if p.numel()} <= {id(p) for p in adapted.module.parameters()}
    assert not any(p.requires_grad for p in plain.parameters() if p.numel())


@IN_LAYOUTS
def test_a_rank_above_a_factors_smaller_side_is_that_side_at_the_same_scale(layout: Layout) -> None:
    dense, progress = tiny_random(), Progress(quiet=True)
    made = compress(
        dense,
        recipe(replace(LORA, rank=12, alpha=30.0, learning_rate=0.01), layout=layout),
        Workspace(Cache(None), progress),
    )
    plain = updated(dense, NoUpdate(), layout=layout).module
    adapted = adapted_twin(plain, find_factors(plain), rank=12, alpha=30.0, dropout=0.0, seed=0)
    sides = {name: min(factor.shape) for name, factor in find_factors(plain).items()}
    assert {name: adapter.rank for name, adapter in adapted.adapters.items()} == {
        name: min(12, side) for name, side in sides.items()
    }
    assert [adapter.scaling for adapter in adapted.adapters.values()] == pytest.approx([2.5] * len(sides))
    clipped = sum(side < 12 for side in sides.values())
    assert 0 < clipped < len(sides) and made.update["clipped_adapters"] == clipped
    assert f"lora: {clipped} of {len(sides)} factors have a side below update.rank=12" in "; ".join(progress.notes)
    assert made.update["held_out_loss_after"] < made.update["held_out_loss_before"]
    assert updated(dense, LORA, layout=layout).update["clipped_adapters"] == sum(side < 3 for side in sides.values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"factors": "all"},
        {"loss": "mse"},
        {"rank": 0},
        {"alpha": 0.0},
        {"dropout": 1.0},
        {"temperature": 0.0},
        {"matrices": "q"},
        {"steps": -1},
        {"learning_rate": 0.0},
        {"holdout": 1.0},
    ],
    ids=repr,
)
def test_settings_out_of_range_name_themselves(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))} must"):
        replace(LORA, **wrong)


def test_a_run_records_what_lora_did(
    cli: Callable[..., Any], tiny: tuple[str, ...], texts: Path, tmp_path: Path
) -> None:
    corpus = ("update=lora_corpus", "corpus@update.data.corpus=text", f"update.data.corpus.files=[{texts}/B.txt]")
    data = ("update.data.sequence_length=64", "update.data.num_sequences=20")
    steps = ("update.steps=6", "update.evaluate_every=3", "update.learning_rate=0.01", "update.merge=false")
    settings = ("retain_ratio=0.5", "update.rank=2", "save_model=true", f"hydra.run.dir={tmp_path}/out")
    done = cli(*tiny, *corpus, *data, *steps, *settings)
    assert done.status == 0, done.err
    record = read_record(tmp_path / "out")
    assert record.update["steps"] == 6 and record.update["windows"]["corpus"]
    assert record.update["held_out_loss_after"] < record.update["held_out_loss_before"]
    assert "lora: held-out loss" in done.err and record.timings["update"] > 0
    assert (tmp_path / "out" / "model" / ADAPTER_FOLDER / "adapter_model.safetensors").is_file()
