"""Throughput: that it runs on every family, and what it says of its settings."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from bs_exp.errors import ConfigError
from bs_exp.evaluation.throughput import Throughput
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.surgery import replace_matrices, twin
from bs_exp.models.tiny import FAMILIES, tiny_random
from bs_exp.types import LoadedModel, SharedFactors, WeightGroup


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


def _pair() -> tuple[LoadedModel, LoadedModel]:
    """A dense model, and one whose q of layers 0 and 1 share a basis of rank 4."""
    dense = tiny_random("llama")
    factors = SharedFactors(
        WeightGroup("q", (0, 1), 32, 32), torch.randn(32, 4), {i: torch.randn(4, 32) for i in (0, 1)}
    )
    module = twin(dense.module)
    replace_matrices(module, dense.architecture, [factors], PlainLayout())
    return dense, replace(dense, module=module, original=dense)


def test_both_models_are_timed_in_turns_and_the_first_changes_every_round() -> None:
    dense, compressed = _pair()
    order: list[str] = []
    for name, model in (("dense", dense), ("compressed", compressed)):
        model.module.register_forward_pre_hook(
            lambda _, __, arguments, name=name: order.append(name) if arguments["input_ids"].shape[1] == 5 else None,
            with_kwargs=True,
        )
    found = _throughput(repeats=6, warmup=1).compare(dense, compressed)
    assert order == ["dense", "compressed", "compressed", "dense"] * 3 + ["dense", "compressed"]
    for metrics in found:
        assert metrics["throughput/timed"] == "in turns"
        assert metrics["throughput/decode_tok_s"] > 0
    for rate in ("throughput/prefill_tok_s", "throughput/decode_tok_s"):
        low, median, high = (found[1][f"{rate}_speedup{end}"] for end in ("_low", "", "_high"))
        assert low <= median <= high
        assert found[1][f"{rate}_difference"] in ("faster", "slower", "no difference measured")
        assert not {f"{rate}_speedup", f"{rate}_difference"} & found[0].keys()
    assert set(_throughput().compared(dense)) <= found[1].keys()


def test_a_model_that_waits_is_slower() -> None:
    dense, compressed = _pair()
    settings = {"repeats": 9, "warmup": 1, "generated_length": 6}
    compressed.module.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    _, found = _throughput(**settings).compare(dense, compressed)
    assert (found["throughput/decode_tok_s_difference"], found["throughput/prefill_tok_s_difference"]) == (
        "slower",
    ) * 2
    assert found["throughput/decode_tok_s_speedup_high"] < 1


def test_without_memory_for_both_they_are_timed_apart_and_no_difference_is_said() -> None:
    dense, compressed = _pair()
    before = [p.detach().clone() for p in (*dense.module.parameters(), *compressed.module.parameters())]
    calls: list[str] = []

    def lack_memory(*_: object) -> None:
        calls.append("compressed")
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")

    compressed.module.register_forward_pre_hook(lack_memory)
    both = _throughput(repeats=6).compare(dense, compressed)
    assert [metrics["throughput/timed"] for metrics in both] == ["apart: no memory for both"] * 2
    assert both[1]["throughput/decode_tok_s_difference"] == "no difference measured"
    assert not [name for name in both[1] if name.endswith(("_speedup", "_speedup_low", "_drift"))]
    assert both[0]["throughput/decode_tok_s"] > 0 and both[1]["throughput/decode_tok_s"] > 0
    after = [*dense.module.parameters(), *compressed.module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
