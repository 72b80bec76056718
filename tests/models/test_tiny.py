"""Tiny random models: reproducible, without side effects, and close enough to real ones."""

from __future__ import annotations

import pytest
import torch

from bs_exp.errors import ConfigError
from bs_exp.models.tiny import FAMILIES, TinyRandom, byte_tokenizer, tiny_random


def test_global_random_state_is_left_alone() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20241)
        before = torch.random.get_rng_state()
        tiny_random("llama")
        assert torch.equal(torch.random.get_rng_state(), before)


def test_seed_decides_the_weights() -> None:
    assert tiny_random(seed=1).fingerprint == tiny_random(seed=1).fingerprint
    assert tiny_random(seed=1).fingerprint != tiny_random(seed=2).fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_in_eval_mode_and_depend_on_every_parameter_scale(family: str) -> None:
    model = tiny_random(family, layers=2)
    assert model.architecture.num_layers == 2
    assert not any(module.training for module in model.module.modules())
    # Neither zero biases nor unit norms: they would hide a lost bias or norm.
    assert all(parameter.std() > 0.02 for parameter in model.module.parameters() if parameter.numel() > 8)
    logits = model.module(input_ids=torch.arange(30)[None]).logits.detach()
    assert 0.1 < logits.std() < 30


def test_dtype_is_the_fp32_model_rounded_and_rotary_frequencies_keep_theirs() -> None:
    full, half = tiny_random("llama"), TinyRandom(family="llama", dtype="bfloat16").load()
    assert half.provenance["dtype"] == "bfloat16"
    pairs = zip(full.module.parameters(), half.module.parameters(), strict=True)
    assert all(torch.equal(a.to(torch.bfloat16), b) for a, b in pairs)
    assert half.module.get_submodule("model.rotary_emb").inv_freq.dtype == torch.float32


def test_tokenizer_round_trips_any_text_and_adds_nothing() -> None:
    tokenizer = byte_tokenizer()
    text = " Grüße,\n\tthe  wörld 語! "
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer("<|endoftext|>").input_ids == [tokenizer.eos_token_id]
    assert len(tokenizer) == tiny_random().module.config.vocab_size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "lama"}, r"family must be one of llama, .*, got 'lama'"),
        ({"layers": 0}, "layers must be a whole number of at least 1, got 0"),
        ({"layers": "many"}, "layers must be a whole number of at least 1, got 'many'"),
        ({"seed": 0.5}, "seed must be a whole number, got 0.5"),
        ({"dtype": "fp32"}, r"dtype must be one of float32, float16, bfloat16, auto, got 'fp32'"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda, cuda:N, mps or xpu, got 'gpu'"),
        ({"roles": {"q_proj": "query"}}, r"model\.roles: 'q_proj' is mapped to 'query'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TinyRandom(**settings)  # type: ignore[arg-type]
