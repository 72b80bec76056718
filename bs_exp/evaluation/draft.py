"""The compressed model as the draft of its dense original in speculative decoding: how many of its tokens are accepted.

The draft writes a few tokens, one pass of the dense model checks them all and adds one of its own (Leviathan et al.,
2211.17192, algorithm 1; here greedily, so that the text is the dense model's own greedy text).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from bs_exp.corpora.content import content_of
from bs_exp.corpora.sampling import evenly_spaced
from bs_exp.corpora.windows import check_special_tokens, cut_windows, max_positions
from bs_exp.errors import ConfigError
from bs_exp.evaluation.in_turns import compare_rounds, in_turn
from bs_exp.evaluation.size import stored_bytes
from bs_exp.evaluation.texts import tracked
from bs_exp.models.model_inputs import check_task
from bs_exp.models.offload import is_offloaded
from bs_exp.protocols import Corpus
from bs_exp.records import metrics
from bs_exp.records.metrics import metric
from bs_exp.types import LoadedModel, Task
from bs_exp.validation import check_at_least


@dataclass(frozen=True)
class _Run:
    """What one `generate` wrote behind its prompt, in how many passes of the dense model, and how long it took.

    Of `drafted` tokens the first `accepted` in each pass were those that the dense model writes.
    """

    text: Int[Tensor, " written"]
    passes: int
    drafted: int
    accepted: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Greedy `generate(assistant_model=...)` of Transformers, with the compressed model as assistant of the dense one.

    Prompts are windows of `prompt_length` tokens, `num_prompts` of each text, evenly spaced; None takes all. Up to
    `generated_length` tokens are written behind each, fewer where the dense model ends its text. The draft writes
    `drafted_tokens` at a time, always as many: Transformers' own default stops where the draft is unsure.
    Nothing is random. Sequences are decoded one by one, since Transformers assists no batches.
    """

    corpora: Mapping[str, Corpus]
    prompt_length: int
    generated_length: int
    drafted_tokens: int
    num_prompts: int | None
    special_tokens: bool

    def __post_init__(self) -> None:
        if not self.corpora:
            raise ConfigError("corpora is empty; name at least one, or leave the evaluator out.")
        check_at_least(1, prompt_length=self.prompt_length, drafted_tokens=self.drafted_tokens)
        check_at_least(1, num_prompts=self.num_prompts)
        # The last token is always the dense model's own, so of two tokens one is drafted.
        check_at_least(2, generated_length=self.generated_length)
        check_special_tokens(self.special_tokens)

    def content(self) -> Mapping[str, str]:
        return content_of(self.corpora)

    def check(self, model: LoadedModel) -> None:
        """ConfigError for a model that writes no text, cannot take tokens back, is offloaded, or has few positions."""
        check_task(model, "Speculative decoding (evaluation=draft)", Task.CAUSAL_LM)
        kind = type(model.module).__name__
        if not model.module.can_generate() or getattr(model.module, "_is_stateful", False):
            raise ConfigError(
                f"Speculative decoding (evaluation=draft) takes back tokens that were drafted in vain, which {kind} "
                "cannot: Transformers has no generate() for it, or its state cannot be cut. Use evaluation=full."
            )
        if is_offloaded(model.module):
            raise ConfigError(
                "evaluation=draft cannot run with model.offload=cpu or disk: both models would be read from the host "
                "or the disk for every token. Use evaluation=perplexity, or set model.offload=none."
            )
        length, limit = self.prompt_length + self.generated_length, max_positions(model)
        if limit is not None and length > limit:
            raise ConfigError(
                f"prompt_length {self.prompt_length} and generated_length {self.generated_length} add up to {length} "
                f"tokens, but the model has {limit} positions; make them shorter."
            )

    def compared(self, dense: LoadedModel) -> tuple[str, ...]:
        kinds = (metrics.DRAFT_ACCEPTANCE, metrics.DRAFT_PER_PASS, metrics.DRAFT_SAME_TEXT, metrics.DRAFT_BOUND)
        return tuple(metric(kind, name) for name in self.corpora for kind in kinds)

    def evaluate(self, model: LoadedModel) -> Mapping[str, float | str]:
        """The metrics of `compare` of a model with its original; alone a model writes one token in each pass."""
        if model.original is not None:
            return self.compare(model.original, model)[1]
        found: dict[str, float | str] = self._settings()
        with _plain(model.module, self.drafted_tokens):
            for name, corpus in self.corpora.items():
                prompts, text_hash = self._prompts(corpus, model)
                runs = [self._write(model.module, prompt) for prompt in tracked(prompts, name, total=len(prompts))]
                found |= _per_pass(name, runs) | {metric(metrics.DRAFT, name, metrics.TEXT_SHA256): text_hash}
        return found

    def compare(
        self, dense: LoadedModel, compressed: LoadedModel
    ) -> tuple[Mapping[str, float | str], Mapping[str, float | str]]:
        """Of the compressed model as draft, by text; of the dense model alone `draft_tokens_per_pass/NAME`, which is 1.

        `draft_acceptance/NAME` is the share of drafted tokens that were accepted, `draft_tokens_per_pass/NAME` the
        tokens written per pass of the dense model, both over all prompts together, with `_stderr` over prompts.
        `draft_same_text/NAME` is the share of prompts with the very text of the dense model's greedy decoding: below 1
        where two tokens are as good as equal, since passes over several tokens round otherwise than those over one.
        `draft_speedup_bound/NAME` is what the speed-up could be if reading the weights took all the time (2211.17192,
        theorem 3.8, with the cost of a draft's pass as its share of the bytes). `draft_speedup/NAME` is the one
        measured here, the median over prompts, each of which is timed with and without a draft in turns, with its
        interval, the drift of the machine, and in words whether that is a difference. `draft_tokens/NAME` counts what
        was drafted.
        """
        found: tuple[dict[str, float | str], dict[str, float | str]] = self._settings(), self._settings()
        with _plain(dense.module, self.drafted_tokens), _plain(compressed.module, self.drafted_tokens):
            for name, corpus in self.corpora.items():
                prompts, text_hash = self._prompts(corpus, dense)
                alone, assisted = self._in_turns(dense.module, compressed.module, prompts, f"draft on {name}")
                for of_model in found:
                    of_model[metric(metrics.DRAFT, name, metrics.TEXT_SHA256)] = text_hash
                found[0].update(_per_pass(name, alone))
                found[1].update(_of_draft(name, alone, assisted, _share_read(dense.module, compressed.module)))
        return found

    def _settings(self) -> dict[str, float | str]:
        named = ("prompt_length", "generated_length", "drafted_tokens")
        return {metric(metrics.DRAFT, name): getattr(self, name) for name in named}

    def _prompts(self, corpus: Corpus, model: LoadedModel) -> tuple[list[Int[Tensor, "1 length"]], str]:
        text, origin = corpus.read()
        ids = cut_windows(
            text, model.tokenizer, sequence_length=self.prompt_length, special_tokens=self.special_tokens
        ).ids
        chosen = ids[evenly_spaced(len(ids), self.num_prompts)].to(model.device)
        return list(chosen.split(1)), str(origin["fingerprint"])

    def _in_turns(
        self, dense: PreTrainedModel, draft: PreTrainedModel, prompts: Sequence[Tensor], label: str
    ) -> tuple[list[_Run], list[_Run]]:
        """The dense model alone and assisted on every prompt, in turns, after an unmeasured round on the first one."""
        for assistant in (None, draft):
            self._write(dense, prompts[0], assistant)
        runs: tuple[list[_Run], list[_Run]] = [], []
        turns = in_turn(2, len(prompts))
        for count, which in enumerate(tracked(turns, label, total=2 * len(prompts))):
            runs[which].append(self._write(dense, prompts[count // 2], draft if which else None))
        return runs

    def _write(self, dense: PreTrainedModel, prompt: Tensor, draft: PreTrainedModel | None = None) -> _Run:
        """What the dense model writes behind a prompt `[1, length]`, with or without a draft."""
        passes: list[Tensor] = []
        handle = dense.register_forward_pre_hook(
            lambda _, __, arguments: passes.append(arguments["input_ids"]), with_kwargs=True
        )
        try:
            start = _now(dense.device)
            written = dense.generate(  # type: ignore[operator]
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.generated_length,
                assistant_model=draft,
            )
            seconds = _now(dense.device) - start
        finally:
            handle.remove()
        whole, known = written[0], prompt.shape[1]
        drafted = accepted = 0
        for number, read in enumerate(passes):
            tokens = read[0, known if number == 0 else 1 :]
            right = _leading_matches(tokens, whole[known : known + len(tokens)])
            drafted, accepted, known = drafted + len(tokens), accepted + right, known + right + 1
        return _Run(whole[prompt.shape[1] :], len(passes), drafted, accepted, seconds)


def _leading_matches(tokens: Int[Tensor, " drafted"], text: Int[Tensor, " rest"]) -> int:
    same = tokens[: len(text)] == text
    return int(same.long().cumprod(0).sum())


@contextmanager
def _plain(module: PreTrainedModel, drafted_tokens: int) -> Iterator[None]:
    """Greedy generation without the checkpoint's own settings (penalties, sampling), and as many drafted tokens."""
    kept = module.generation_config
    ends = getattr(kept, "eos_token_id", None)
    first = ends[0] if isinstance(ends, list) else ends
    module.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=first or 0,
        num_assistant_tokens=drafted_tokens,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    try:
        yield
    finally:
        module.generation_config = kept


def _of_draft(name: str, alone: Sequence[_Run], assisted: Sequence[_Run], share: float) -> dict[str, float | str]:
    """The metrics of a draft that reads `share` of the dense model's bytes, on the text `name`."""
    accepted, drafted = [run.accepted for run in assisted], [run.drafted for run in assisted]
    acceptance, error = ratio_with_error(accepted, drafted)
    same = [torch.equal(one.text, other.text) for one, other in zip(alone, assisted, strict=True)]
    passes = sum(run.passes for run in assisted)
    written = sum(len(run.text) for run in assisted)
    comparison = compare_rounds([run.seconds for run in alone], [run.seconds for run in assisted])
    found: dict[str, float | str] = {
        metric(metrics.DRAFT_ACCEPTANCE, name): acceptance,
        **_if_known(metric(metrics.DRAFT_ACCEPTANCE, name, metrics.STANDARD_ERROR), error),
        **_per_pass(name, assisted),
        metric(metrics.DRAFT_SAME_TEXT, name): sum(same) / len(same),
        metric(metrics.DRAFT_BOUND, name): written / (passes + sum(drafted) * share),
        metric(metrics.DRAFT, name, metrics.TOKENS): sum(drafted),
        metric(metrics.DRAFT, name, metrics.SPEEDUP): comparison.ratio,
        metric(metrics.DRAFT, name, metrics.DRIFT): comparison.drift,
        metric(metrics.DRAFT, name, metrics.DIFFERENCE): comparison.in_words,
    }
    for end, value in zip((metrics.SPEEDUP_LOW, metrics.SPEEDUP_HIGH), comparison.interval or (), strict=False):
        found[metric(metrics.DRAFT, name, end)] = value
    return found


def _per_pass(name: str, runs: Sequence[_Run]) -> dict[str, float | str]:
    value, error = ratio_with_error([len(run.text) for run in runs], [run.passes for run in runs])
    return {
        metric(metrics.DRAFT_PER_PASS, name): value,
        **_if_known(metric(metrics.DRAFT_PER_PASS, name, metrics.STANDARD_ERROR), error),
    }


def _if_known(name: str, value: float | None) -> dict[str, float | str]:
    return {} if value is None else {name: value}


def ratio_with_error(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, float | None]:
    """`sum(parts) / sum(wholes)`, and its standard error where each pair is one independent draw; None for one pair.

    By the delta method (Cochran, Sampling Techniques, section 2.11), with the sums over the same pairs.
    """
    ratio, count = sum(parts) / sum(wholes), len(parts)
    if count < 2:
        return ratio, None
    rest = sum((part - ratio * whole) ** 2 for part, whole in zip(parts, wholes, strict=True))
    return ratio, math.sqrt(rest * count / (count - 1)) / sum(wholes)


def _share_read(dense: PreTrainedModel, draft: PreTrainedModel) -> float:
    """Bytes of weights that a pass of the draft reads, over those of the dense model; of embeddings only rows are."""
    return _read(draft) / _read(dense)


def _read(module: PreTrainedModel) -> int:
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    weight = getattr(embedding, "weight", None)
    rows_alone = isinstance(weight, Tensor) and getattr(head, "weight", None) is not weight
    return stored_bytes(module) - (weight.nbytes if rows_alone and isinstance(weight, Tensor) else 0)


def _now(device: torch.device) -> float:
    """A clock in seconds, read after the device has finished all work given to it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
