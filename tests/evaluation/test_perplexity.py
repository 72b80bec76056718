"""Perplexity against values computed token by token, in fp64, without batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from bs_exp.errors import ConfigError, DataError
from bs_exp.evaluation import perplexity
from bs_exp.evaluation.perplexity import Perplexity
from bs_exp.models.tiny import byte_tokenizer, tiny_random
from bs_exp.types import LoadedModel

TEXT = "The quick brown fox jumps over the lazy dog, which was not amused."  # 66 tokens of one byte


@dataclass(frozen=True)
class Fixed:
    text: str = TEXT

    def read(self) -> tuple[str, dict[str, object]]:
        return self.text, {"fingerprint": "f" * 64}


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_random("llama", layers=1)


def _perplexity(**settings: Any) -> Perplexity:
    defaults: dict[str, Any] = {
        "corpora": {"fixed": Fixed()},
        "sequence_length": 16,
        "stride": None,
        "tail": "drop",
        "average": "tokens",
        "max_windows": None,
        "batch_size": 3,
        "special_tokens": False,
    }
    return Perplexity(**{**defaults, **settings})


def _losses(model: LoadedModel, spans: Sequence[tuple[int, int, int]]) -> list[list[float]]:
    """Losses of tokens first..end-1, each window read from `begin`: (begin, first, end)."""
    ids = byte_tokenizer()(TEXT)["input_ids"]
    windows = []
    for begin, first, end in spans:
        with torch.no_grad():
            logits = model.module(torch.tensor([ids[begin:end]])).logits[0].double()
        windows.append([-float(logits[i - begin - 1].log_softmax(-1)[ids[i]]) for i in range(first, end)])
    return windows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _over_tokens(windows: Sequence[Sequence[float]]) -> float:
    return math.exp(_mean([loss for window in windows for loss in window]))


FULL = [(0, 1, 16), (16, 17, 32), (32, 33, 48), (48, 49, 64)]
TAIL = (64, 65, 66)


def test_every_predicted_token_weighs_the_same(model: LoadedModel) -> None:
    metrics = _perplexity().evaluate(model)
    assert metrics["ppl/fixed"] == pytest.approx(_over_tokens(_losses(model, FULL)), rel=1e-5)
    assert metrics["ppl_tokens/fixed"] == 60
    assert metrics["ppl_text_sha256/fixed"] == "f" * 64


def test_a_short_last_window_counts_by_its_tokens_or_as_a_window(model: LoadedModel) -> None:
    windows = _losses(model, [*FULL, TAIL])
    by_tokens = _perplexity(tail="keep").evaluate(model)
    by_windows = _perplexity(tail="keep", average="windows").evaluate(model)
    assert by_tokens["ppl_tokens/fixed"] == by_windows["ppl_tokens/fixed"] == 61
    assert by_tokens["ppl/fixed"] == pytest.approx(_over_tokens(windows), rel=1e-5)
    assert by_windows["ppl/fixed"] == pytest.approx(math.exp(_mean([_mean(w) for w in windows])), rel=1e-5)
    assert abs(by_tokens["ppl/fixed"] / by_windows["ppl/fixed"] - 1) > 1e-3  # the two differ on this text


def test_a_tail_of_one_token_predicts_nothing(model: LoadedModel) -> None:
    for average in ("tokens", "windows"):
        kept = _perplexity(sequence_length=13, tail="keep", average=average).evaluate(model)  # 66 = 5 * 13 + 1
        assert kept == _perplexity(sequence_length=13, average=average).evaluate(model)


def test_overlapping_windows_count_every_token_once(model: LoadedModel) -> None:
    spans = [(0, 1, 16), (10, 16, 26), (20, 26, 36), (30, 36, 46), (40, 46, 56), (50, 56, 66)]
    metrics = _perplexity(stride=10, tail="keep").evaluate(model)
    assert metrics["ppl_tokens/fixed"] == 65
    assert metrics["ppl/fixed"] == pytest.approx(_over_tokens(_losses(model, spans)), rel=1e-5)
    with_tail = [(0, 1, 20), (15, 20, 35), (30, 35, 50), (45, 50, 65), (60, 65, 66)]
    metrics = _perplexity(sequence_length=20, stride=15, tail="keep").evaluate(model)
    assert metrics["ppl_tokens/fixed"] == 65
    assert metrics["ppl/fixed"] == pytest.approx(_over_tokens(_losses(model, with_tail)), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "spans"),
    [
        # Of 66 tokens, 15 in a window: with the BOS in front of them, their first is predicted, too.
        ({"tail": "keep"}, [(0, 0, 15), (15, 15, 30), (30, 30, 45), (45, 45, 60), (60, 60, 66)]),
        ({"stride": 10}, [(0, 0, 15), (10, 15, 25), (20, 25, 35), (30, 35, 45), (40, 45, 55), (50, 55, 65)]),
        ({"max_windows": 2}, [(0, 0, 15), (45, 45, 60)]),
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_a_bos_in_front_of_every_window_is_context(
    model: LoadedModel, settings: dict[str, Any], spans: list[tuple[int, int, int]], after: bool
) -> None:
    """Oracle: the BOS and each window's text run on their own. A token behind the text does not count."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    pairs = [(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)]
    template = f"{bos} $A {eos}" if after else f"{bos} $A"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=pairs)
    ids = byte_tokenizer()(TEXT)["input_ids"]
    windows = []
    for begin, first, end in spans:
        with torch.no_grad():
            logits = model.module(torch.tensor([[tokenizer.bos_token_id, *ids[begin:end]]])).logits[0].double()
        windows.append([-float(logits[i - begin].log_softmax(-1)[ids[i]]) for i in range(first, end)])
    length = 17 if after else 16
    found = _perplexity(sequence_length=length, special_tokens="per_window", **settings).evaluate(
        replace(model, tokenizer=tokenizer)
    )
    assert found["ppl_tokens/fixed"] == sum(map(len, windows))
    assert found["ppl/fixed"] == pytest.approx(_over_tokens(windows), rel=1e-5)


def test_fewer_windows_are_spread_over_the_text(model: LoadedModel) -> None:
    metrics = _perplexity(max_windows=2, tail="keep").evaluate(model)
    expected = _over_tokens(_losses(model, [FULL[0], FULL[-1]]))
    assert metrics["ppl_tokens/fixed"] == 30
    assert metrics["ppl/fixed"] == pytest.approx(expected, rel=1e-5)
    assert _perplexity(max_windows=4).evaluate(model) == _perplexity().evaluate(model)


def test_batches_and_chunks_of_logits_change_nothing(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _perplexity().evaluate(model)["ppl/fixed"]
    assert _perplexity(batch_size=1).evaluate(model)["ppl/fixed"] == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(perplexity, "_LOGITS_PER_CHUNK", 4 * 258)
    assert _perplexity().evaluate(model)["ppl/fixed"] == expected


def test_any_number_of_corpora(model: LoadedModel) -> None:
    metrics = _perplexity(corpora={"a": Fixed(), "b": Fixed(TEXT[::-1])}).evaluate(model)
    assert metrics["ppl/a"] != metrics["ppl/b"]


def test_losses_that_are_not_finite_give_an_infinite_perplexity_and_are_counted() -> None:
    model = tiny_random("llama", layers=1)
    with torch.no_grad():
        model.module.get_output_embeddings().weight.mul_(1e38)
    metrics = _perplexity().evaluate(model)
    assert metrics["ppl/fixed"] == math.inf
    assert metrics["ppl_nonfinite/fixed"] > 0


def test_a_mean_loss_beyond_the_range_of_exp_is_infinite() -> None:
    model = tiny_random("llama", layers=1)
    with torch.no_grad():
        model.module.get_output_embeddings().weight.mul_(1e6)
    metrics = _perplexity().evaluate(model)
    assert metrics["ppl/fixed"] == math.inf
    assert "ppl_nonfinite/fixed" not in metrics


def test_bf16_models_are_measured_in_fp32(model: LoadedModel) -> None:
    half = tiny_random("llama", layers=1)
    half.module.bfloat16()
    expected = _perplexity().evaluate(model)["ppl/fixed"]
    assert _perplexity().evaluate(half)["ppl/fixed"] == pytest.approx(expected, rel=0.1)


def test_windows_longer_than_the_model_and_texts_too_short_are_refused(model: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="sequence_length is 600, but the model has 512 positions"):
        _perplexity(sequence_length=600, corpora={"long": Fixed(TEXT * 30)}).evaluate(model)
    with pytest.raises(DataError, match="66 tokens found, 128 needed"):
        _perplexity(sequence_length=128).evaluate(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpora": {}}, "corpora is empty"),
        ({"sequence_length": 1}, "sequence_length must be a whole number of at least 2"),
        ({"stride": 17}, "stride must be at most sequence_length \\(16\\), got 17"),
        ({"stride": 0}, "stride"),
        ({"max_windows": 0}, "max_windows"),
        ({"tail": "cut"}, "tail must be one of drop, keep"),
        ({"average": "mean"}, "average must be one of tokens, windows"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _perplexity(**settings)
