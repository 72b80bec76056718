"""Recovery trains the factors and nothing else, never for the worse, and to the same bits however often interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bs_exp.cache import Cache
from bs_exp.errors import CalibrationError, ConfigError, DataError
from bs_exp.models.saving import save_model
from bs_exp.models.surgery import find_factors
from bs_exp.models.tiny import TinyRandom, tiny_random
from bs_exp.pipeline import compress
from bs_exp.progress import Progress
from bs_exp.protocols import Layout
from bs_exp.records.record import read_record
from bs_exp.testing.models import LAYOUTS, QUIET, Tokens, recipe, same, updated, values
from bs_exp.training.settings import split_windows
from bs_exp.types import CompressedModel, LoadedModel, Pooling
from bs_exp.update.none import NoUpdate
from bs_exp.update.recover import KIND
from bs_exp.workspace import Workspace
from tests.support.encoders import headless
from tests.support.updates import RECOVERY, Interrupting


def recovered(
    dense: LoadedModel, update: Any = RECOVERY, cache: Cache | None = None, **options: Any
) -> CompressedModel:
    return updated(dense, update, cache, **options)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_divergence_falls_and_every_factor_changes(family: str, layout: Layout) -> None:
    dense = tiny_random(family)
    plain = recovered(dense, NoUpdate(), layout=layout)
    made = recovered(dense, layout=layout)
    report = made.update
    assert report["held_out_kl_after"] < 0.95 * report["held_out_kl_before"]
    old = values(plain.module)
    assert all(not torch.equal(factor, old[name]) for name, factor in find_factors(made.module).items())


def test_the_reported_divergence_is_that_of_the_result() -> None:
    """Oracle: the held-out KL by torch's own categorical distributions."""
    dense = tiny_random()
    made = recovered(dense)
    _, held_out = split_windows(Tokens().windows(None).ids, RECOVERY)
    with torch.no_grad():
        ours, theirs = (torch.distributions.Categorical(logits=m(held_out).logits) for m in (dense.module, made.module))
    measured = float(torch.distributions.kl_divergence(ours, theirs).mean())
    assert made.update["held_out_kl_after"] == pytest.approx(measured, rel=1e-4)
    assert made.update["held_out_kl_after"] == min(value for _, value in made.update["held_out_kl"])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_saved_model_holds_the_trained_factors(layout: Layout, tmp_path: Path) -> None:
    dense, ids = tiny_random(), torch.arange(20)[None]
    made = recovered(dense, layout=layout)
    folder = save_model(made.module, dense.tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, made.module(ids).logits)


def test_blocks_learn_the_dense_blocks_outputs() -> None:
    """Oracle: blocks of the result on the dense model's inputs, in units of what the dense block adds."""
    dense = tiny_random()
    plain, made = (
        recovered(dense, NoUpdate()),
        recovered(dense, replace(RECOVERY, blockwise_steps=8, steps=0, learning_rate=0.01, piece_length=None)),
    )
    _, held_out = split_windows(Tokens().windows(None).ids, RECOVERY)

    def error(module: PreTrainedModel) -> float:
        shares = []
        with torch.no_grad():
            states = dense.module.model(held_out, output_hidden_states=True).hidden_states
            rotary = dense.module.model.rotary_emb(states[0], torch.arange(held_out.shape[1])[None])
            for layer, block in enumerate(dense.module.model.layers):
                wanted = block(states[layer], position_embeddings=rotary)
                found = module.model.layers[layer](states[layer], position_embeddings=rotary)
                lost, added = ((wanted - x).square().flatten(1).sum(1) for x in (found, states[layer]))
                shares.append(lost / added)
        return float(torch.stack(shares).mean())

    blocks = made.update["blockwise"]
    assert blocks["held_out_error_before"] == pytest.approx(error(plain.module), rel=1e-4)
    assert blocks["held_out_error_after"] < 0.995 * blocks["held_out_error_before"]
    if made.update["held_out_kl_after"] < made.update["held_out_kl_before"]:  # else it was undone
        assert blocks["held_out_error_after"] == pytest.approx(error(made.module), rel=1e-4)


def test_blocks_first_then_predictions(tmp_path: Path) -> None:
    dense = tiny_random()
    update = replace(RECOVERY, blockwise_steps=4, checkpoint_minutes=0.0)
    whole = recovered(dense, update)
    assert whole.update["tokens"] == 12 * 4 * 24
    assert whole.update["held_out_kl_after"] < 0.95 * whole.update["held_out_kl_before"]
    with pytest.raises(KeyboardInterrupt):
        compress(dense, recipe(update), Workspace(Cache(tmp_path), Interrupting(steps=2)))
    progress = Progress(quiet=True)
    resumed = compress(dense, recipe(update), Workspace(Cache(tmp_path), progress))
    assert "recovering blocks: 2 of 4 steps came from the cache" in progress.notes
    assert same(values(whole.module), values(resumed.module))


@pytest.mark.parametrize("steps", [0, 2])
def test_blocks_that_do_harm_to_the_predictions_are_undone(steps: int) -> None:
    dense = tiny_random()
    harmful = replace(RECOVERY, blockwise_steps=4, steps=steps, learning_rate=10.0, warmup=0.0, clip_norm=None)
    made = recovered(dense, replace(harmful, holdout=0.5, schedule="constant"))
    assert made.update["held_out_kl_after"] <= made.update["held_out_kl_before"]
    _, held_out = split_windows(Tokens().windows(None).ids, replace(harmful, holdout=0.5))
    with torch.no_grad():
        ours, theirs = (torch.distributions.Categorical(logits=m(held_out).logits) for m in (dense.module, made.module))
    measured = float(torch.distributions.kl_divergence(ours, theirs).mean())
    assert made.update["held_out_kl_after"] == pytest.approx(measured, rel=1e-4)


def test_another_seed_is_another_training() -> None:
    dense = tiny_random()
    first, other = recovered(dense), recovered(dense, replace(RECOVERY, seed=1))
    assert not same(values(first.module), values(other.module))


def test_zero_steps_change_nothing() -> None:
    dense = tiny_random()
    made = recovered(dense, replace(RECOVERY, steps=0))
    assert same(values(made.module), values(recovered(dense, NoUpdate()).module))
    assert made.update["steps"] == 0


def test_a_dense_model_has_nothing_to_train() -> None:
    progress = Progress(quiet=True)
    made = compress(tiny_random(), replace(recipe(RECOVERY), retain_ratio=1.0), Workspace(Cache(None), progress))
    assert made.update["steps"] == 0 and "recovery: there are no factors to train" in progress.notes


def test_training_that_does_harm_is_undone() -> None:
    dense, progress = tiny_random(), Progress(quiet=True)
    harmful = replace(
        RECOVERY, learning_rate=10.0, warmup=0.0, schedule="constant", clip_norm=None, patience=2, back_off=False
    )
    made = compress(dense, recipe(harmful), Workspace(Cache(None), progress))
    assert same(values(made.module), values(recovered(dense, NoUpdate()).module))
    assert made.update["held_out_kl_after"] == made.update["held_out_kl_before"]
    assert made.update["steps"] == 4  # two evaluations without gain
    # 16 of the 32 windows that 8 steps would have seen: every whole window, or a resampled one in its place.
    assert made.update["training_windows"] == 16
    assert 16 - 13 <= made.update["resampled_windows"] <= 16
    assert any("stay as they were" in note for note in progress.notes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_that_are_too_large_become_smaller(dtype: str) -> None:
    dense, progress = TinyRandom(family="gpt2", dtype=dtype).load(), Progress(quiet=True)
    large = replace(RECOVERY, learning_rate=1.0, warmup=0.0, steps=24, evaluate_every=2, patience=4)
    lost = recovered(dense, replace(large, back_off=False)).update
    assert lost["held_out_kl_after"] == lost["held_out_kl_before"] and lost["last_learning_rate"] == 1.0
    made = compress(dense, recipe(replace(large, patience=None)), Workspace(Cache(None), progress)).update
    assert made["held_out_kl_after"] < 0.95 * made["held_out_kl_before"]
    told = [note for note in progress.notes if "goes on from the best factors, of step" in note]
    assert made["last_learning_rate"] == 4.0 ** -len(told) < 1.0
    above = [value for _, value in made["held_out_kl"] if value > 2.0 * made["held_out_kl_before"]]
    assert len(above) == len(told)
    # What is lost is no measurement without gain.
    patient = recovered(dense, large).update
    assert patient["held_out_kl_after"] < patient["held_out_kl_before"]


@pytest.mark.parametrize(("dtype", "rate"), [("float32", 1e12), ("float16", 1e4)])
def test_steps_after_which_nothing_is_finite_become_smaller(dtype: str, rate: float) -> None:
    dense, progress = TinyRandom(dtype=dtype).load(), Progress(quiet=True)
    update = replace(RECOVERY, optimizer="adamw", learning_rate=rate, warmup=0.0, clip_norm=None, steps=30)
    made = compress(dense, recipe(update), Workspace(Cache(None), progress)).update
    assert made["held_out_kl_after"] <= made["held_out_kl_before"]
    assert any("is nan" in note or "is inf" in note for note in progress.notes), progress.notes
    assert made["steps"] == 30


@pytest.mark.parametrize(
    ("optimizer", "dtype", "rate"),
    [
        ("soap", "float32", 0.02),
        ("soap", "bfloat16", 0.02),
        ("soap", "float32", 1e12),
        ("soap", "bfloat16", 1e12),
        ("adamw", "float32", 0.02),
        ("adamw", "float16", 0.02),
    ],
)
def test_an_interrupted_recovery_goes_on_to_the_same_bits(
    optimizer: str, dtype: str, rate: float, tmp_path: Path
) -> None:
    dense = TinyRandom(dtype=dtype).load()
    update = replace(RECOVERY, checkpoint_minutes=0.0, optimizer=optimizer, learning_rate=rate)
    whole = recovered(dense, update)
    assert (whole.update["last_learning_rate"] < rate) == (rate == 1e12)
    for steps in (3, 2):
        with pytest.raises(KeyboardInterrupt):
            compress(dense, recipe(update), Workspace(Cache(tmp_path), Interrupting(steps=steps)))
    progress = Progress(quiet=True)
    resumed = compress(dense, recipe(update), Workspace(Cache(tmp_path), progress))
    assert "recovery: 5 of 8 steps came from the cache" in progress.notes
    assert same(values(whole.module), values(resumed.module))
    assert resumed.update["held_out_kl"] == whole.update["held_out_kl"]
    assert all(p.requires_grad and p.grad is None for p in dense.module.parameters())
    # Once finished, it is found: nothing is trained again, and only the result stays on disk.
    again = compress(dense, recipe(update), Workspace(Cache(tmp_path), Interrupting(steps=0)))
    assert same(values(whole.module), values(again.module))
    reports = [{**made.update, "seconds": None, "generation_seconds": None} for made in (whole, again)]
    assert reports[0] == reports[1]
    [file] = (tmp_path / KIND).iterdir()
    stored = sum(f.numel() * f.element_size() for f in find_factors(whole.module).values())
    assert stored < file.stat().st_size < 1.5 * stored


def test_fp16_steps_that_overflow_are_taken_again(tmp_path: Path) -> None:
    """Large gradients: the first attempts overflow, no step is lost by it, and a checkpoint in between is no trap."""
    dense = TinyRandom(dtype="float16").load()
    with torch.no_grad():
        dense.module.get_output_embeddings().weight.mul_(400.0)
    update = replace(RECOVERY, checkpoint_minutes=0.0, learning_rate=1e-3)
    whole = recovered(dense, update)
    assert whole.update["held_out_kl_after"] < whole.update["held_out_kl_before"]
    with pytest.raises(KeyboardInterrupt):
        compress(dense, recipe(update), Workspace(Cache(tmp_path), Interrupting(steps=1)))
    resumed = compress(dense, recipe(update), Workspace(Cache(tmp_path), QUIET))
    assert same(values(whole.module), values(resumed.module))


@pytest.mark.parametrize(
    "changes", [{"learning_rate": 0.01}, {"seed": 1}, {"steps": 7}, {"temperature": 2.0}, {"piece_length": 7}]
)
def test_other_settings_are_another_training(changes: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny_random()
    recovered(dense, cache=Cache(tmp_path))
    cache = Cache(tmp_path)
    recovered(dense, replace(RECOVERY, **changes), cache)
    assert (cache.hits[KIND], cache.misses[KIND]) == (0, 1)
    same_result = Cache(tmp_path)
    recovered(dense, replace(RECOVERY, checkpoint_minutes=1.0), same_result)
    assert (same_result.hits[KIND], same_result.misses[KIND]) == (1, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_factors_are_trained_in_fp32(dtype: str) -> None:
    """Steps far below what the stored dtype can resolve add up."""
    dense = TinyRandom(dtype=dtype).load()
    small = replace(RECOVERY, steps=40, learning_rate=5e-4, schedule="constant", evaluate_every=10)
    made = recovered(dense, small)
    assert made.update["held_out_kl_after"] < 0.98 * made.update["held_out_kl_before"]
    assert {p.dtype for p in made.module.parameters()} == {dense.module.dtype}


def test_accumulation_changes_rounding_alone() -> None:
    dense = tiny_random()
    dense.module.double()
    # Adam's: SOAP's first bases magnify rounding errors.
    update = replace(RECOVERY, optimizer="adamw")
    whole, parts = recovered(dense, update), recovered(dense, replace(update, accumulation=3))
    for name, value in values(whole.module).items():
        torch.testing.assert_close(values(parts.module)[name], value, rtol=1e-6, atol=1e-9)


def test_autocast_recovers_too() -> None:
    report = recovered(tiny_random(), replace(RECOVERY, autocast="bfloat16", piece_length=None)).update
    assert report["held_out_kl_after"] < 0.9 * report["held_out_kl_before"]


def test_a_divergence_that_is_not_a_number_names_the_step() -> None:
    """A first step so large that the logits overflow in the second one."""
    dense = tiny_random()
    update = replace(RECOVERY, accumulation=2, optimizer="adamw", learning_rate=1e30, back_off=False)
    with pytest.raises(CalibrationError, match=r"loss of step 2 is nan\..*learning_rate \(now 1e\+30\)"):
        recovered(dense, update)
    assert all(p.requires_grad and p.grad is None for p in dense.module.parameters())


def test_one_window_is_too_few() -> None:
    with pytest.raises(DataError, match="at least 2 calibration windows"):
        compress(tiny_random(), replace(recipe(RECOVERY), calibration=Tokens(count=1)), Workspace(Cache(None), QUIET))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": -1},
        {"blockwise_steps": -1},
        {"batch_size": 0},
        {"accumulation": 0},
        {"accumulation": 5},  # of 4 windows
        {"optimizer": "adam"},
        {"precondition_frequency": 0},
        {"max_precond_dim": -1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"schedule": "cosinus"},
        {"warmup": 1.0},
        {"weight_decay": -0.1},
        {"clip_norm": 0.0},
        {"temperature": 0.0},
        {"autocast": "float16"},
        {"holdout": 0.0},
        {"holdout": 1.0},
        {"evaluate_every": 0},
        {"patience": 0},
        {"checkpoint_minutes": -1.0},
        {"seed": -1},
    ],
    ids=repr,
)
def test_settings_out_of_range_name_themselves(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))} must"):
        replace(RECOVERY, **wrong)


def test_a_run_records_what_recovery_did(cli: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path) -> None:
    settings = ("experiment=basis_sharing", "retain_ratio=0.5", "update=recover", "update.steps=6")
    done = cli(*tiny, *settings, "update.evaluate_every=3", f"hydra.run.dir={tmp_path}/out")
    assert done.status == 0, done.err
    record = read_record(tmp_path / "out")
    assert record.update["steps"] == 6
    assert record.update["held_out_kl_after"] < record.update["held_out_kl_before"]
    assert "recovery: held-out KL" in done.err and record.timings["update"] > 0


@pytest.mark.parametrize("objective", ["auto", "mse", "embedding"])
def test_a_model_without_logits_is_trained_on_its_outputs(objective: str) -> None:
    """Oracle: the held-out distance of the result, window by window in numpy."""
    dense = replace(headless(3), pooling=Pooling(modes=("mean",)))
    settings = replace(RECOVERY, objective=objective, generated_windows=4)
    made = recovered(dense, settings)
    name = "cosine" if objective == "auto" else objective
    after = made.update[f"held_out_{name}_after"]
    assert after < 0.95 * made.update[f"held_out_{name}_before"]
    assert made.update["generated_windows"] == 0 < made.update["resampled_windows"]
    _, held_out = split_windows(Tokens().windows(None).ids, settings)
    with torch.no_grad():
        old, new = (m(input_ids=held_out).last_hidden_state.double().numpy() for m in (dense.module, made.module))
    if name == "mse":
        wanted = np.mean([np.square(x - y).sum() / np.square(x).sum() for x, y in zip(old, new, strict=True)])
    else:
        old, new = (x.mean(1) if name == "embedding" else x for x in (old, new))
        norms = np.linalg.norm(old, axis=-1) * np.linalg.norm(new, axis=-1)
        wanted = np.mean(1.0 - (old * new).sum(-1) / norms)
    assert after == pytest.approx(float(wanted), rel=1e-4)


def test_objectives_that_a_model_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs logits"):
        replace(RECOVERY, objective="kl").check(headless(), Tokens().data())
    with pytest.raises(ConfigError, match="objective=embedding needs a sentence-transformers model"):
        replace(RECOVERY, objective="embedding").check(headless(), Tokens().data())
    with pytest.raises(ConfigError, match=r"^objective must be one of auto, kl, cosine, mse, embedding, got 'l2'"):
        replace(RECOVERY, objective="l2")
