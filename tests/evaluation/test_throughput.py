"""Throughput: that it runs on every family, and what it says of its settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bs_exp.errors import ConfigError
from bs_exp.evaluation.throughput import Throughput
from bs_exp.models.tiny import FAMILIES, tiny_random


def _throughput(**settings: int) -> Throughput:
    defaults = {"batch_size": 2, "prompt_length": 5, "generated_length": 3, "repeats": 3, "warmup": 1, "seed": 0}
    return Throughput(**{**defaults, **settings})


def test_prefill_and_decode_apart_with_their_spread_and_settings() -> None:
    metrics = _throughput().evaluate(tiny_random("llama"))
    for phase in ("prefill", "decode"):
        name = f"throughput/{phase}_tok_s"
        assert 0 < metrics[f"{name}_min"] <= metrics[name] <= metrics[f"{name}_max"]
    assert "throughput/peak_memory_bytes" not in metrics  # of a process it cannot be told model by model
    assert metrics["throughput/device"].startswith("cpu")
    settings = ("dtype", "batch_size", "prompt_length", "generated_length", "repeats", "warmup")
    assert [metrics[f"throughput/{name}"] for name in settings] == ["float32", 2, 5, 3, 3, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_sees_the_whole_past(family: str) -> None:
    """The cache is used, and used rightly: step by step as from the whole sequence."""
    model = tiny_random(family)
    calls: list[dict[str, Any]] = []
    model.module.register_forward_hook(
        lambda _, __, arguments, output: calls.append({**arguments, "logits": output.logits}), with_kwargs=True
    )
    _throughput(repeats=1, warmup=0).evaluate(model)
    assert [call["input_ids"].shape[1] for call in calls] == [5, 1, 1, 1]
    with torch.no_grad():
        whole = model.module(torch.cat([call["input_ids"] for call in calls], dim=1)).logits
    torch.testing.assert_close(whole[:, -1], calls[3]["logits"][:, -1], rtol=1e-3, atol=1e-3)


def test_runs_are_counted() -> None:
    model = tiny_random("llama")
    lengths: list[int] = []
    model.module.register_forward_pre_hook(
        lambda _, __, arguments: lengths.append(arguments["input_ids"].shape[1]), with_kwargs=True
    )
    _throughput(repeats=2, warmup=3).evaluate(model)
    assert lengths.count(5) == 5
    assert lengths.count(1) == 15


def test_lengths_beyond_the_context_are_refused() -> None:
    with pytest.raises(ConfigError, match="add up to 513 tokens, but the model has 512 positions"):
        _throughput(prompt_length=500, generated_length=13).evaluate(tiny_random("llama"))


@pytest.mark.parametrize("name", ["batch_size", "prompt_length", "generated_length", "repeats"])
def test_wrong_settings_are_refused_at_once(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a whole number of at least 1, got 0"):
        _throughput(**{name: 0})
