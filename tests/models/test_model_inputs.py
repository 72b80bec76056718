"""Windows reach every model the way it was trained, and its loss is its own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from bs_exp.errors import ConfigError, ModelError
from bs_exp.models.model_inputs import IGNORED, check_has_logits, check_task, feeder, hidden_states
from bs_exp.models.tiny import ENCODER_DECODERS, ENCODERS, tiny_random
from bs_exp.types import Feeding, LoadedModel, Task

LENGTH = 40
ALL = ("llama", "gpt2", "opt", *ENCODERS, *ENCODER_DECODERS)


def windows(count: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(0))


def encoder_without_head() -> LoadedModel:
    whole = tiny_random("bert")
    return LoadedModel(whole.module.bert, whole.tokenizer, whole.architecture, whole.provenance, Task.ENCODER)


@pytest.mark.parametrize("target", ["continuation", "spans"])
@pytest.mark.parametrize("family", ALL)
def test_the_loss_is_the_models_own(family: str, target: str) -> None:
    """Oracle: the loss that the model itself computes from labels, which shifts and starts as it was trained to."""
    model, ids = tiny_random(family), windows()
    examples = feeder(model, Feeding(target=target)).examples(ids)
    labels = ids if model.task is Task.CAUSAL_LM else examples.labels
    with torch.no_grad():
        own = model.module(input_ids=examples.inputs["input_ids"], labels=labels).loss
        ours = examples.loss(model.module(**examples.inputs).logits, reduction="mean")
    torch.testing.assert_close(ours, own)


@pytest.mark.parametrize("target", ["continuation", "spans"])
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("length", [2, 3, 17, LENGTH])
def test_predictions_and_positions_are_counted(family: str, target: str, length: int) -> None:
    feed = feeder(tiny_random(family), Feeding(target=target))
    examples = feed.examples(windows(length=length))
    assert (examples.labels != IGNORED).sum(1).tolist() == [feed.predictions(length)] * 3
    read, predicted = examples.shapes
    assert feed.positions(length) == max(read[1], predicted[1])


@pytest.mark.parametrize("family", ALL)
def test_hidden_states_are_the_last_ones_and_cost_no_logits(family: str) -> None:
    model, ids = tiny_random(family), windows()
    inputs = feeder(model).inputs(ids)

    def forbidden(module: nn.Module, arguments: object) -> None:
        raise AssertionError("the head ran")

    head = model.module.get_output_embeddings()
    with torch.no_grad():
        output = model.module(**inputs, output_hidden_states=True)
        handle = head.register_forward_pre_hook(forbidden)
        try:
            found = hidden_states(model.module, inputs)
        finally:
            handle.remove()
    kept = output.decoder_hidden_states if model.task is Task.SEQ2SEQ_LM else output.hidden_states
    torch.testing.assert_close(found, kept[-1])


def test_masks_hide_a_share_of_the_tokens_and_nothing_else() -> None:
    model, ids = tiny_random("bert"), windows()
    mask = model.tokenizer.mask_token_id
    feed = feeder(model, Feeding(mask_share=0.25))
    examples = feed.examples(ids)
    hidden = examples.inputs["input_ids"] == mask
    assert hidden.sum(1).tolist() == [10, 10, 10]
    assert torch.equal(examples.inputs["input_ids"][~hidden], ids[~hidden])
    assert torch.equal(examples.labels[hidden], ids[hidden])
    assert (examples.labels[~hidden] == IGNORED).all()
    assert torch.equal(feed.inputs(ids)["input_ids"], ids), "activations are those of whole windows"


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_window_is_fed_the_same_in_every_batch_and_differently_by_seed(family: str) -> None:
    model, ids = tiny_random(family), windows()
    feed, other = (feeder(model, Feeding(target="spans", seed=seed)) for seed in (0, 1))
    together = feed.examples(ids)
    alone = [feed.examples(window[None]) for window in ids.flip(0)]
    assert torch.equal(together.labels, torch.cat([e.labels for e in alone]).flip(0))
    assert not torch.equal(together.labels, other.examples(ids).labels)


def test_a_continuation_is_the_rest_of_the_window() -> None:
    model, ids = tiny_random("t5"), windows()
    examples = feeder(model, Feeding(source_share=0.75)).examples(ids)
    source, target = examples.inputs["input_ids"], examples.labels
    assert (source.shape[1], target.shape[1]) == (30, 10)
    assert torch.equal(torch.cat((source, target), dim=1), ids)
    start = model.module.config.decoder_start_token_id
    assert examples.inputs["decoder_input_ids"][:, 0].tolist() == [start] * 3
    assert torch.equal(examples.inputs["decoder_input_ids"][:, 1:], target[:, :-1])


def test_spans_put_back_in_place_of_their_sentinels_give_the_window() -> None:
    model, ids = tiny_random("t5"), windows(count=20)
    vocabulary = model.tokenizer.get_vocab()
    sentinels = [vocabulary[f"<extra_id_{number}>"] for number in range(32)]
    examples = feeder(model, Feeding(target="spans", mask_share=0.3)).examples(ids)
    begins = Counter()
    for window, source, target in zip(ids, examples.inputs["input_ids"], examples.labels, strict=True):
        *spans, end = target.tolist()
        assert end == model.tokenizer.eos_token_id
        marks = [token for token in spans if token in sentinels]
        assert marks == sentinels[:4], "12 tokens of 40 in spans of 3"
        found: dict[int, list[int]] = {}
        for token in spans:
            if token in marks:
                current = found.setdefault(token, [])
            else:
                current.append(token)
        assert all(found.values()) and sum(map(len, found.values())) == 12
        rebuilt = [t for token in source.tolist() for t in found.get(token, [token])]
        assert rebuilt == window.tolist()
        begins[source.tolist().index(marks[0])] += 1
    assert min(begins) >= 1 and len(begins) > 5, "spans stand anywhere but at the very beginning"


def test_too_few_sentinels_are_refused_with_the_numbers() -> None:
    feed = feeder(tiny_random("t5"), Feeding(target="spans", mask_share=0.5))
    with pytest.raises(ConfigError, match=r"400 tokens with mask_share 0\.5 have 67 spans, .* has 32 sentinel tokens"):
        feed.examples(windows(length=400))


def test_what_a_tokenizer_lacks_is_named() -> None:
    bert, t5 = tiny_random("bert"), tiny_random("t5")
    bare = tiny_random("llama").tokenizer
    unmasked = LoadedModel(bert.module, bare, bert.architecture, {}, Task.MASKED_LM)
    assert feeder(unmasked).inputs(windows()).keys() == {"input_ids"}, "activations need no mask"
    with pytest.raises(ModelError, match="names no mask token"):
        feeder(unmasked).examples(windows())
    with pytest.raises(ConfigError, match=r"target=spans needs .* has 0 sentinels\. Use target=continuation"):
        feeder(LoadedModel(t5.module, bare, t5.architecture, {}, Task.SEQ2SEQ_LM), Feeding(target="spans"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_share": 0.0}, r"mask_share must be above 0 and below 1, got 0\.0"),
        ({"source_share": 1}, "source_share must be above 0 and below 1, got 1"),
        ({"target": "span"}, "target must be one of continuation, spans, got 'span'"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        feeder(tiny_random("bert"), Feeding(**settings))  # type: ignore[arg-type]


def test_an_encoder_without_a_head_has_no_loss() -> None:
    model = encoder_without_head()
    assert hidden_states(model.module, feeder(model).inputs(windows())).shape == (3, LENGTH, 32)
    with pytest.raises(ConfigError, match=r"BertModel is an encoder without a language-model head.*whitening=gram"):
        feeder(model).examples(windows())
    with pytest.raises(ConfigError, match=r"^objective=kl needs logits, .* load a checkpoint with its head"):
        check_has_logits(model, "objective=kl")
    check_has_logits(tiny_random("bert"), "objective=kl")


def test_the_wrong_task_is_told_what_to_use() -> None:
    check_task(tiny_random("t5"), "This", Task.CAUSAL_LM, Task.SEQ2SEQ_LM)
    with pytest.raises(
        ConfigError,
        match=r"This needs a causal language model or an encoder-decoder, but this BertForMaskedLM is a masked "
        r"language model\. Use evaluation=encoder\.",
    ):
        check_task(tiny_random("bert"), "This", Task.CAUSAL_LM, Task.SEQ2SEQ_LM)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_windows_of_one_token_predict_nothing(family: str) -> None:
    with pytest.raises(ConfigError, match=r"sequence_length is 1: .*Set it to 2 or more"):
        feeder(tiny_random(family)).examples(torch.zeros(3, 1, dtype=torch.long))


def test_logits_of_other_positions_than_the_labels_are_refused() -> None:
    """Such as those of a model that puts tokens of its own in front."""
    model = tiny_random()
    examples = feeder(model).examples(torch.zeros(2, 4, dtype=torch.int64))
    logits = torch.zeros(2, 5, 258)
    for measure in (lambda: examples.loss(logits, reduction="sum"), lambda: examples.divergence(logits, logits)):
        with pytest.raises(ModelError, match=r"logits for \(2, 5\) windows and positions, .* asked for \(2, 4\)"):
            measure()
