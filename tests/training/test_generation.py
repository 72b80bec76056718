"""Windows that the dense model generates: samples of its own predictions, the same for the same seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bs_exp.cache import Cache
from bs_exp.errors import ConfigError
from bs_exp.models.tiny import tiny_random
from bs_exp.testing.models import QUIET, Tokens, same, updated, values
from bs_exp.training.generation import KIND, GenerationSettings, generate_windows
from bs_exp.types import LoadedModel
from bs_exp.workspace import Workspace
from tests.support.updates import RECOVERY, Interrupting

TEXT = Tokens().windows(None).ids
GENERATION = GenerationSettings(generated_windows=12, prompt_length=4, generation_batch=5, seed=3)


def generated(dense: LoadedModel, settings: GenerationSettings = GENERATION, text: Tensor = TEXT) -> Tensor:
    return generate_windows(settings, dense, text, Workspace(Cache(None), QUIET))


def test_windows_continue_the_text() -> None:
    ids = generated(tiny_random())
    assert ids.shape == (12, TEXT.shape[1])
    prompts = {tuple(prompt.tolist()) for prompt in TEXT.unfold(1, 4, 1).flatten(0, 1)}
    assert all(tuple(prompt.tolist()) in prompts for prompt in ids[:, :4])
    assert len({tuple(window.tolist()) for window in ids}) == 12


def test_tokens_are_drawn_from_the_predictions() -> None:
    """Oracle: the softmax of the model's logits, without the end of a text, which running text does not have."""
    dense = tiny_random()
    with torch.no_grad():
        dense.module.get_output_embeddings().weight.mul_(20.0)  # random weights alone predict all tokens alike
    prompt = TEXT[:1, :4]
    text = torch.cat([prompt, prompt[:, :1]], dim=1)
    drawn = generated(dense, replace(GENERATION, generated_windows=6000, generation_batch=3000), text)
    drawn = drawn[(drawn[:, :4] == prompt).all(1), 4]
    with torch.no_grad():
        logits = dense.module(prompt).logits[0, -1]
    logits[dense.tokenizer.eos_token_id] = -torch.inf
    expected = logits.softmax(-1)
    frequencies = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    distance = float((frequencies - expected).abs().sum()) / 2
    uniform = float((expected - 1 / len(expected)).abs().sum()) / 2
    assert len(drawn) > 2000 and distance < 0.1 < 0.3 < uniform


def test_same_in_same_out_whatever_the_model_would_generate_with() -> None:
    dense = tiny_random()
    first = generated(dense)
    state = torch.random.get_rng_state()
    own = dense.module.generation_config
    own.update(top_k=1, temperature=0.1, repetition_penalty=5.0, max_length=7, num_beams=3, no_repeat_ngram_size=1)
    assert torch.equal(generated(dense), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert dense.module.generation_config is own and own.num_beams == 3
    assert not torch.equal(generated(dense, replace(GENERATION, seed=4)), first)


def test_what_was_generated_is_found_again(tmp_path: Path) -> None:
    dense = tiny_random()
    first = generate_windows(GENERATION, dense, TEXT, Workspace(Cache(tmp_path), QUIET))
    again = Cache(tmp_path)
    assert torch.equal(generate_windows(GENERATION, dense, TEXT, Workspace(again, QUIET)), first)
    assert (again.hits[KIND], again.misses[KIND]) == (3, 0)  # batches of 5 of 12
    for other in (replace(GENERATION, seed=4), replace(GENERATION, prompt_length=5)):
        generate_windows(other, dense, TEXT, Workspace(again, QUIET))
    generate_windows(GENERATION, dense, TEXT[:, :20], Workspace(again, QUIET))
    assert (again.hits[KIND], again.misses[KIND]) == (3, 9)


def test_an_interrupted_generation_continues(tmp_path: Path) -> None:
    dense = tiny_random()
    with pytest.raises(KeyboardInterrupt):
        generate_windows(GENERATION, dense, TEXT, Workspace(Cache(tmp_path), Interrupting(steps=2, label="generating")))
    cache = Cache(tmp_path)
    assert torch.equal(generate_windows(GENERATION, dense, TEXT, Workspace(cache, QUIET)), generated(dense))
    assert (cache.hits[KIND], cache.misses[KIND]) == (2, 1)


def test_recovery_trains_on_them_and_is_judged_on_text_alone() -> None:
    dense = tiny_random()
    settings = replace(RECOVERY, steps=24, piece_length=None)
    plain, more = updated(dense, settings), updated(dense, replace(settings, generated_windows=20))
    assert more.update["training_windows"] == plain.update["training_windows"] + 20
    assert (plain.update["generated_windows"], more.update["generated_windows"]) == (0, 20)
    assert more.update["held_out_kl"][0] == plain.update["held_out_kl"][0]
    assert more.update["held_out_kl_after"] < 0.95 * more.update["held_out_kl_before"]
    assert not same(values(more.module), values(plain.module))


@pytest.mark.parametrize("wrong", [{"generated_windows": -1}, {"prompt_length": 0}, {"generation_batch": 0}], ids=repr)
def test_settings_out_of_range_name_themselves(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))} must"):
        replace(RECOVERY, **wrong)


def test_what_cannot_be_is_said_before_any_work() -> None:
    too_long = replace(RECOVERY, generated_windows=4, prompt_length=24)
    with pytest.raises(ConfigError, match="prompt_length must be below the 24 tokens"):
        too_long.check(tiny_random(), Tokens().data())
