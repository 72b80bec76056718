"""Similarity to the dense model, and perplexities of masked tokens and of decoders' targets, from their definitions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from bs_exp.errors import ConfigError
from bs_exp.evaluation.accuracy import Accuracy
from bs_exp.evaluation.masked_perplexity import MaskedPerplexity
from bs_exp.evaluation.perplexity import Perplexity
from bs_exp.evaluation.seq2seq_perplexity import Seq2SeqPerplexity
from bs_exp.evaluation.similarity import Similarity
from bs_exp.evaluation.throughput import Throughput
from bs_exp.models.architecture import module_of
from bs_exp.models.model_inputs import IGNORED
from bs_exp.models.surgery import twin
from bs_exp.models.tiny import tiny_random
from bs_exp.types import LoadedModel, Task

TEXT = "Grace Hopper wrote the first compiler; it was hard to believe that it would run. " * 8


@dataclass(frozen=True)
class Words:
    text: str = TEXT

    def read(self) -> tuple[str, Mapping[str, object]]:
        return self.text, {"fingerprint": "words"}


CORPORA = {"words": Words()}
COMMON: dict[str, Any] = {
    "corpora": CORPORA, "sequence_length": 20, "mask_share": 0.2, "max_windows": 6, "batch_size": 4,
    "special_tokens": False, "seed": 3,
}  # fmt: skip
MASKED = MaskedPerplexity(**COMMON)
SEQ2SEQ = Seq2SeqPerplexity(**COMMON, target="continuation", source_share=0.6)
SIMILARITY = Similarity(**COMMON, target="continuation", source_share=0.6)


def windows(count: int = 6) -> torch.Tensor:
    """The chosen windows, by hand."""
    ids = torch.tensor(tiny_random("bert").tokenizer(TEXT).input_ids)
    cut = ids[: len(ids) // 20 * 20].view(-1, 20)
    return cut[[round(i * (len(cut) - 1) / (count - 1)) for i in range(count)]]


def without_head(model: LoadedModel) -> LoadedModel:
    return replace(model, module=model.module.base_model, task=Task.ENCODER)


def perturbed(model: LoadedModel) -> LoadedModel:
    """A changed twin that knows its original."""
    module = twin(model.module)
    name = model.architecture.matrices[0].module
    layer = torch.nn.Linear(32, 32, bias=module_of(model.module, model.architecture.matrices[0]).bias is not None)
    module.set_submodule(name, layer)
    return replace(model, module=module, original=model)


def test_masked_perplexity_is_that_of_tokens_behind_masks() -> None:
    """Oracle: every window alone, its log-probabilities picked one by one."""
    model = tiny_random("bert")
    found = MASKED.evaluate(model)
    losses = []
    for window in windows():
        examples = _examples(model, window)
        with torch.no_grad():
            probabilities = model.module(input_ids=examples.inputs["input_ids"]).logits[0].double().log_softmax(-1)
        behind = [i for i, label in enumerate(examples.labels[0].tolist()) if label != IGNORED]
        assert len(behind) == 4
        assert {int(examples.inputs["input_ids"][0, i]) for i in behind} == {model.tokenizer.mask_token_id}
        losses += [-float(probabilities[i, window[i]]) for i in behind]
    assert found["masked_ppl/words"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert found["masked_ppl_tokens/words"] == 24
    assert found["masked_ppl_text_sha256/words"] == "words"


def _examples(model: LoadedModel, window: torch.Tensor) -> Any:
    from bs_exp.models.model_inputs import feeder

    return feeder(model, MASKED.feeding).examples(window[None])


def test_masks_do_not_depend_on_the_batch_or_the_model_but_on_the_seed() -> None:
    model = tiny_random("bert")
    found = MASKED.evaluate(model)["masked_ppl/words"]
    assert replace(MASKED, batch_size=1).evaluate(model)["masked_ppl/words"] == pytest.approx(found, rel=1e-6)
    assert MASKED.evaluate(model)["masked_ppl/words"] == found
    assert replace(MASKED, seed=4).evaluate(model)["masked_ppl/words"] != found


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_seq2seq_perplexity_is_that_of_the_rest_of_each_window(family: str) -> None:
    """Oracle: the model's own loss on source and labels, one window at a time."""
    model = tiny_random(family)
    found = SEQ2SEQ.evaluate(model)
    with torch.no_grad():
        losses = [float(model.module(input_ids=w[None, :12], labels=w[None, 12:].contiguous()).loss) for w in windows()]
    assert found["seq2seq_ppl/words"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found["seq2seq_ppl_tokens/words"] == 6 * 8


def test_spans_are_counted_with_sentinels_and_end() -> None:
    found = replace(SEQ2SEQ, target="spans", mask_share=0.3).evaluate(tiny_random("t5"))
    assert found["seq2seq_ppl_tokens/words"] == 6 * (6 + 2 + 1)


@pytest.mark.parametrize("family", ["bert", "distilbert", "t5", "bart", "llama"])
def test_similarity_compares_last_hidden_states(family: str) -> None:
    """Oracle: the hidden states that the whole models give out, all windows in one batch."""
    model = tiny_random(family)
    changed = perturbed(model)
    ids = windows()
    states = []
    for module in (model.module, changed.module):
        with torch.no_grad():
            if model.task is Task.SEQ2SEQ_LM:
                output = module(input_ids=ids[:, :12], labels=ids[:, 12:].contiguous(), output_hidden_states=True)
                states.append(output.decoder_hidden_states[-1].double())
            else:
                states.append(module(input_ids=ids, output_hidden_states=True).hidden_states[-1].double())
    expected, other = states
    found = SIMILARITY.evaluate(changed)
    assert found["cosine/words"] == pytest.approx(float(functional.cosine_similarity(other, expected, dim=-1).mean()))
    assert found["relative_error/words"] == pytest.approx(float((other - expected).norm() / expected.norm()))
    assert found["relative_error/words"] > 0.0 and found["cosine/words"] < 1.0
    assert found["similarity_tokens/words"] == expected.shape[0] * expected.shape[1]
    dense = SIMILARITY.evaluate(model)
    assert dense["cosine/words"] == pytest.approx(1.0, abs=1e-9)
    assert dense["relative_error/words"] == 0.0


def test_an_encoder_without_a_head_is_judged_by_similarity() -> None:
    model = without_head(tiny_random("bert"))
    SIMILARITY.check(model)
    assert SIMILARITY.evaluate(model)["relative_error/words"] == 0.0


def test_losses_that_are_not_finite_are_counted() -> None:
    model = tiny_random("bert")
    with torch.no_grad():
        model.module.cls.predictions.bias[0] = float("nan")
    found = MASKED.evaluate(model)
    assert found["masked_ppl/words"] == math.inf
    assert found["masked_ppl_nonfinite/words"] == 24


PERPLEXITY = Perplexity(
    corpora=CORPORA, sequence_length=20, stride=None, tail="drop", average="tokens", max_windows=None, batch_size=4,
    special_tokens=False,
)  # fmt: skip
ACCURACY = Accuracy(tasks=["docs_cloze"], limit=4, num_fewshot=None, batch_size=2, seed=0, include_path=[])
THROUGHPUT = Throughput(batch_size=1, prompt_length=4, generated_length=2, repeats=1, warmup=0, seed=0)


@pytest.mark.parametrize(
    ("evaluator", "family", "message"),
    [
        (
            PERPLEXITY,
            "bert",
            r"next token needs a causal language model, but this BertForMaskedLM .*evaluation=encoder",
        ),
        (PERPLEXITY, "t5", r"T5ForConditionalGeneration is an encoder-decoder\. Use evaluation=seq2seq"),
        (ACCURACY, "bert", r"lm-eval's tasks needs a causal language model or an encoder-decoder.*evaluation=encoder"),
        (THROUGHPUT, "bert", r"Throughput .*evaluation=encoder"),
        (THROUGHPUT, "bart", r"Throughput .*evaluation=seq2seq"),
        (MASKED, "llama", r"masked tokens needs a masked language model, but this LlamaForCausalLM .*evaluation=full"),
        (MASKED, "t5", r"Use evaluation=seq2seq"),
        (SEQ2SEQ, "roberta", r"decoder's target needs an encoder-decoder.*evaluation=encoder"),
        (replace(MASKED, sequence_length=800), "roberta", r"sequence_length is 800, but the model has 767 positions"),
        (replace(SIMILARITY, sequence_length=513), "bert", r"sequence_length is 513, but the model has 512 positions"),
        (
            replace(SEQ2SEQ, sequence_length=1000, target="spans", mask_share=0.5),
            "t5",
            r"1000 tokens with mask_share 0\.5 have 167 spans",
        ),
    ],
)
def test_a_model_of_another_kind_is_refused_with_advice(evaluator: Any, family: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluator.check(tiny_random(family))


def test_an_encoder_without_a_head_is_told_to_use_similarity() -> None:
    for evaluator in (PERPLEXITY, ACCURACY, THROUGHPUT, MASKED, SEQ2SEQ):
        with pytest.raises(
            ConfigError, match=r"encoder without a language-model head\. Use evaluation=embeddings or similarity"
        ):
            evaluator.check(without_head(tiny_random("bert")))


def test_evaluators_accept_their_models() -> None:
    for evaluator, family in (
        (PERPLEXITY, "llama"), (ACCURACY, "llama"), (ACCURACY, "t5"), (THROUGHPUT, "llama"), (MASKED, "bert"),
        (SEQ2SEQ, "bart"), (SIMILARITY, "llama"), (SIMILARITY, "bert"), (SIMILARITY, "t5"),
    ):  # fmt: skip
        evaluator.check(tiny_random(family))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpora": {}}, "corpora is empty"),
        ({"sequence_length": 1}, "sequence_length must be a whole number of at least 2, got 1"),
        ({"max_windows": 0}, "max_windows must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"mask_share": 1.0}, r"mask_share must be above 0 and below 1, got 1\.0"),
        ({"seed": -1}, "seed must be"),
        ({"special_tokens": "per_window"}, "special_tokens must be true or false where tokens are masked"),
    ],
)
@pytest.mark.parametrize("evaluator", [MASKED, SEQ2SEQ, SIMILARITY])
def test_wrong_settings_are_refused(evaluator: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(evaluator, **change)
