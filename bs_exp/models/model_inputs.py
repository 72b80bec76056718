"""How token windows become the inputs of a model, and which tokens it predicts from them, for each task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bs_exp.errors import ConfigError, ModelError
from bs_exp.models.architecture import trunks
from bs_exp.models.divergence import kl_divergence
from bs_exp.types import Feeding, LoadedModel, Target, Task
from bs_exp.validation import check_choice, check_seed

Inputs = Mapping[str, Any]
"""Keyword arguments of the model."""

IGNORED = -100
# For messages: what a model of a task is called, and the option that evaluates it.
_KINDS = {
    Task.CAUSAL_LM: "a causal language model",
    Task.MASKED_LM: "a masked language model",
    Task.SEQ2SEQ_LM: "an encoder-decoder",
    Task.ENCODER: "an encoder without a language-model head",
}
_EVALUATIONS = {
    Task.CAUSAL_LM: "evaluation=full",
    Task.MASKED_LM: "evaluation=encoder",
    Task.SEQ2SEQ_LM: "evaluation=seq2seq",
    Task.ENCODER: "evaluation=embeddings or similarity",
}
_MEAN_SPAN = 3.0
_SENTINEL = "<extra_id_{}>"


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and labels of a model's training loss; `labels` align with the logits, `IGNORED` where nothing counts."""

    inputs: Inputs
    labels: Int[Tensor, "windows positions"]

    @property
    def shapes(self) -> tuple[torch.Size, torch.Size]:
        """The shapes `[windows, positions]` of input ids and of labels; they differ for an encoder-decoder."""
        return self.inputs["input_ids"].shape, self.labels.shape

    def loss(self, logits: Float[Tensor, "windows positions vocabulary"], *, reduction: str) -> Tensor:
        """Cross entropy of the predicted tokens in nats, in fp32; `reduction` is that of `cross_entropy`."""
        self._check(logits)
        chosen = logits.flatten(0, -2).index_select(0, self._predicted)  # its gradient is made faster than a mask's
        return functional.cross_entropy(chosen.float(), self.labels.flatten()[self._predicted], reduction=reduction)

    def divergence(
        self,
        logits: Float[Tensor, "windows positions vocabulary"],
        target: Float[Tensor, "windows positions vocabulary"],
    ) -> Tensor:
        """`KL(softmax(target) || softmax(logits))` in nats, summed over the predicted tokens."""
        self._check(logits)
        return kl_divergence(logits, target, tokens=self._predicted)

    def _check(self, logits: Tensor) -> None:
        if logits.shape[:-1] != self.labels.shape:
            raise ModelError(
                f"The model gave logits for {tuple(logits.shape[:-1])} windows and positions, where it was asked for "
                f"{tuple(self.labels.shape)}. Models that add or drop positions cannot be calibrated on a loss."
            )

    @property
    def _predicted(self) -> Int[Tensor, " tokens"]:
        return (self.labels != IGNORED).flatten().nonzero()[:, 0]


class Feeder(Protocol):
    """Turns windows of token ids into inputs and labels for models of one task, on the device of the ids."""

    def inputs(self, ids: Int[Tensor, "windows length"]) -> Inputs:
        """The inputs of the model when calibration gathers activations."""

    def examples(self, ids: Int[Tensor, "windows length"]) -> Examples:
        """Inputs and labels of the model's own training loss. ConfigError if it has none."""

    def outputs(self, length: int) -> int:
        """Last hidden states per window: those of the decoder, if there is one."""

    def predictions(self, length: int) -> int:
        """Predicted tokens per window."""

    def positions(self, length: int) -> int:
        """Positions that a window takes in the model's context."""


def feeder(model: LoadedModel, feeding: Feeding = Feeding()) -> Feeder:  # noqa: B008  frozen
    """The feeder of a model. ConfigError or ModelError if the model or its tokenizer lacks what the settings need."""
    check_feeding(feeding)
    return _FEEDERS[model.task](model, feeding)


def unlabelled(feed: Feeder, ids: Int[Tensor, "windows length"]) -> Examples:
    """The inputs of the model when activations are gathered, with labels that name nothing to predict."""
    inputs = feed.inputs(ids)
    written: Tensor = inputs.get("decoder_input_ids", inputs["input_ids"])
    return Examples(inputs, torch.full_like(written, IGNORED))


def hidden_states(module: PreTrainedModel, inputs: Inputs) -> Float[Tensor, "windows positions channels"]:
    """The last hidden states, for an encoder-decoder those of its decoder; no logits are computed.

    Where encoder and decoder are plain modules, it is what the model without the outermost head calls hidden states.
    """
    first, *decoder = trunks(module)
    if not decoder:
        read: Tensor = first(**inputs).last_hidden_state
        return read
    if not all(isinstance(part, PreTrainedModel) for part in (first, *decoder)):
        whole: Tensor = module.base_model(**inputs).last_hidden_state
        return whole
    memory = first(input_ids=inputs["input_ids"]).last_hidden_state
    written: Tensor = decoder[0](
        input_ids=inputs["decoder_input_ids"], encoder_hidden_states=memory, use_cache=False
    ).last_hidden_state
    return written


def check_feeding(feeding: Feeding) -> None:
    """ConfigError for a share outside (0, 1), an unknown target, or a negative seed."""
    for name, value in (("mask_share", feeding.mask_share), ("source_share", feeding.source_share)):
        if not 0.0 < value < 1.0:
            raise ConfigError(f"{name} must be above 0 and below 1, got {value}.")
    check_choice("target", feeding.target, get_args(Target))
    check_seed(feeding.seed)


def check_task(model: LoadedModel, what: str, *allowed: Task) -> None:
    """ConfigError, with the option to use instead, unless the model's task is allowed; `what` names what needs it."""
    if model.task not in allowed:
        raise ConfigError(
            f"{what} needs {' or '.join(_KINDS[task] for task in allowed)}, but this {type(model.module).__name__} is "
            f"{_KINDS[model.task]}. Use {_EVALUATIONS[model.task]}."
        )


def check_has_logits(model: LoadedModel, what: str) -> None:
    """ConfigError if the model computes no logits, and so has no loss; `what` names what needs them."""
    if model.task is Task.ENCODER:
        raise _no_logits(model, what)


def _no_logits(model: LoadedModel, what: str) -> ConfigError:
    return ConfigError(
        f"{what} needs logits, but this {type(model.module).__name__} is {_KINDS[model.task]}. Use strategies that "
        "need outputs or activations alone (whitening=gram, diagonal, block_diagonal or identity, or two_sided with "
        "whitening.curvature=probes; allocation=water_filling, uniform or effective_rank; evaluation=embeddings or "
        "similarity), or load a checkpoint with its head, such as BertForMaskedLM."
    )


class CausalFeeder:
    """Every token of a window is read, and every token but the first is predicted from those before it."""

    def __init__(self, model: LoadedModel, feeding: Feeding) -> None:
        pass

    def inputs(self, ids: Tensor) -> Inputs:
        return {"input_ids": ids, "use_cache": False}

    def examples(self, ids: Tensor) -> Examples:
        _require_two_tokens(ids)
        return Examples(self.inputs(ids), functional.pad(ids[:, 1:], (0, 1), value=IGNORED))

    def outputs(self, length: int) -> int:
        return length

    def predictions(self, length: int) -> int:
        return length - 1

    def positions(self, length: int) -> int:
        return length


class EncoderFeeder:
    """Windows are read as they are; there is nothing to predict."""

    def __init__(self, model: LoadedModel, feeding: Feeding) -> None:
        self._model = model

    def inputs(self, ids: Tensor) -> Inputs:
        return {"input_ids": ids}

    def examples(self, ids: Tensor) -> Examples:
        raise _no_logits(self._model, "A loss")

    def outputs(self, length: int) -> int:
        return length

    def predictions(self, length: int) -> int:
        return 0

    def positions(self, length: int) -> int:
        return length


class MaskedFeeder:
    """Activations are those of windows without masks; the loss is over `mask_share` of the tokens, which are masked.

    `round(mask_share * length)` tokens (at least one) are chosen, and all of them are replaced by the mask token:
    BERT's training (1810.04805, section 3.1) leaves some of them unchanged, which an evaluation does not need.
    """

    def __init__(self, model: LoadedModel, feeding: Feeding) -> None:
        self._model = model
        self._feeding = feeding

    def inputs(self, ids: Tensor) -> Inputs:
        return {"input_ids": ids}

    def examples(self, ids: Tensor) -> Examples:
        mask = self._model.tokenizer.mask_token_id
        if mask is None:
            raise ModelError(
                f"The tokenizer of this {type(self._model.module).__name__} names no mask token, so its masked-token "
                "loss cannot be computed. Load a tokenizer with a mask token (tokenizer.mask_token)."
            )
        count = self.predictions(ids.shape[1])
        hidden = torch.zeros(ids.shape, dtype=torch.bool)
        for row, window in zip(hidden, ids.cpu(), strict=True):
            row[torch.randperm(len(window), generator=window_generator(window, self._feeding.seed))[:count]] = True
        hidden = hidden.to(ids.device)
        return Examples({"input_ids": ids.masked_fill(hidden, mask)}, ids.masked_fill(~hidden, IGNORED))

    def outputs(self, length: int) -> int:
        return length

    def predictions(self, length: int) -> int:
        return max(1, round(self._feeding.mask_share * length))

    def positions(self, length: int) -> int:
        return length


class ContinuationFeeder:
    """The encoder reads the first `source_share` of a window, the decoder predicts the rest, token by token.

    The decoder's first input is the model's start token (Raffel et al., 1910.10683, section 3.2.1: a prefix language
    model's targets).
    """

    def __init__(self, model: LoadedModel, feeding: Feeding) -> None:
        self._start = _start_token(model)
        self._feeding = feeding

    def inputs(self, ids: Tensor) -> Inputs:
        return self.examples(ids).inputs

    def examples(self, ids: Tensor) -> Examples:
        _require_two_tokens(ids)
        cut = self._cut(ids.shape[1])
        return _source_and_target(ids[:, :cut], ids[:, cut:], self._start)

    def outputs(self, length: int) -> int:
        return self.predictions(length)

    def predictions(self, length: int) -> int:
        return length - self._cut(length)

    def positions(self, length: int) -> int:
        return max(self._cut(length), length - self._cut(length))

    def _cut(self, length: int) -> int:
        return min(max(1, round(self._feeding.source_share * length)), length - 1)


class SpansFeeder:
    """The encoder reads a window with spans cut out, a sentinel in place of each; the decoder predicts the spans.

    T5's own objective (1910.10683, section 3.3.4): `mask_share` of the tokens are cut out, in spans of 3 on average;
    the window begins with a token that stays, and the target ends with the end token. As in T5's code, the numbers of
    tokens and spans depend on the length alone, so windows of equal length give sources and targets of equal length.
    """

    def __init__(self, model: LoadedModel, feeding: Feeding) -> None:
        self._start = _start_token(model)
        self._feeding = feeding
        self._sentinels = _sentinels(model.tokenizer)
        self._end = model.tokenizer.eos_token_id
        if not self._sentinels or self._end is None:
            raise ConfigError(
                "target=spans needs an end token and sentinel tokens (<extra_id_0>, <extra_id_1>, ...) in the "
                f"tokenizer, as T5 has them; the tokenizer of this {type(model.module).__name__} has "
                f"{len(self._sentinels)} sentinels. Use target=continuation."
            )

    def inputs(self, ids: Tensor) -> Inputs:
        return self.examples(ids).inputs

    def examples(self, ids: Tensor) -> Examples:
        _require_two_tokens(ids)
        pairs = [self._split(window) for window in ids.cpu()]
        source, target = (torch.stack(part).to(ids.device) for part in zip(*pairs, strict=True))
        return _source_and_target(source, target, self._start)

    def outputs(self, length: int) -> int:
        return self.predictions(length)

    def predictions(self, length: int) -> int:
        noise, spans = self._counts(length)
        return noise + spans + 1

    def positions(self, length: int) -> int:
        noise, spans = self._counts(length)
        return max(length - noise + spans, noise + spans + 1)

    def _counts(self, length: int) -> tuple[int, int]:
        """The number of tokens to cut out, and of spans; ConfigError if the tokenizer has too few sentinels."""
        noise = min(max(1, round(self._feeding.mask_share * length)), length - 1)
        spans = min(max(1, round(noise / _MEAN_SPAN)), length - noise)
        if spans > len(self._sentinels):
            raise ConfigError(
                f"Windows of {length} tokens with mask_share {self._feeding.mask_share} have {spans} spans, but the "
                f"tokenizer has {len(self._sentinels)} sentinel tokens. Lower mask_share or sequence_length."
            )
        return noise, spans

    def _split(self, window: Int[Tensor, " length"]) -> tuple[Tensor, Tensor]:
        """Source and target of one window."""
        noise, spans = self._counts(len(window))
        generator = window_generator(window, self._feeding.seed)
        kept = _partition(len(window) - noise, spans, generator)
        cut = _partition(noise, spans, generator)
        pieces = window.split([size for pair in zip(kept, cut, strict=True) for size in pair])
        source, target = [], []
        for sentinel, stays, goes in zip(self._sentinels, pieces[::2], pieces[1::2], strict=False):
            mark = window.new_tensor([sentinel])
            source += [stays, mark]
            target += [mark, goes]
        return torch.cat(source), torch.cat([*target, window.new_tensor([self._end])])


_TARGETS: Mapping[Target, type[ContinuationFeeder] | type[SpansFeeder]] = {
    "continuation": ContinuationFeeder,
    "spans": SpansFeeder,
}
_FEEDERS: Mapping[Task, Callable[[LoadedModel, Feeding], Feeder]] = {
    Task.CAUSAL_LM: CausalFeeder,
    Task.MASKED_LM: MaskedFeeder,
    Task.SEQ2SEQ_LM: lambda model, feeding: _TARGETS[feeding.target](model, feeding),
    Task.ENCODER: EncoderFeeder,
}


def _require_two_tokens(ids: Int[Tensor, "windows length"]) -> None:
    """ConfigError for windows in which no token is predicted from another."""
    if ids.shape[1] < 2:
        raise ConfigError(
            f"sequence_length is {ids.shape[1]}: in such windows no token is predicted from another, so there is no "
            "loss and nothing to compare. Set it to 2 or more (calibration.sequence_length)."
        )


def _source_and_target(source: Tensor, target: Tensor, start: int) -> Examples:
    decoder_ids = functional.pad(target[:, :-1], (1, 0), value=start)
    # The losses of some models need contiguous labels.
    return Examples({"input_ids": source, "decoder_input_ids": decoder_ids, "use_cache": False}, target.contiguous())


def _start_token(model: LoadedModel) -> int:
    config = model.module.config
    for start in (getattr(config, "decoder_start_token_id", None), getattr(config, "bos_token_id", None)):
        if start is not None:
            return int(start)
    raise ModelError(
        f"The configuration of this {type(model.module).__name__} names neither decoder_start_token_id nor "
        "bos_token_id, so the first token of its decoder is unknown. Add one to its config.json."
    )


def _sentinels(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of <extra_id_0>, <extra_id_1>, ..., as far as the tokenizer has them."""
    vocabulary = tokenizer.get_vocab()
    found: list[int] = []
    while (token := _SENTINEL.format(len(found))) in vocabulary:
        found.append(vocabulary[token])
    return found


def _partition(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """`parts` sizes of at least 1 that add up to `total`, drawn uniformly from all such lists."""
    cuts = (torch.randperm(total - 1, generator=generator)[: parts - 1] + 1).sort().values.tolist()
    bounds = [0, *cuts, total]
    return [end - begin for begin, end in pairwise(bounds)]


def window_generator(window: Int[Tensor, " length"], seed: int) -> torch.Generator:
    """A generator seeded by the window's ids and `seed`: its numbers depend on no batch, order or model."""
    if type(window) is not Tensor:  # an estimate's, which holds no ids: any numbers will do
        return torch.Generator().manual_seed(seed)
    content = window.contiguous().numpy().astype("<i8").tobytes()
    digest = hashlib.sha256(f"{seed}:".encode() + content).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
