"""Perplexity on any number of corpora."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from bs_exp import processes
from bs_exp.corpora.content import content_of
from bs_exp.corpora.evaluated import EvaluatedWindows, text_hash
from bs_exp.corpora.windows import SpecialTokens, Tail, check_fits, check_length, check_special_tokens
from bs_exp.errors import ConfigError
from bs_exp.evaluation.texts import cut_now, tracked
from bs_exp.models.model_inputs import check_task
from bs_exp.models.outputs import logits_of
from bs_exp.protocols import Corpus
from bs_exp.records.metrics import NONFINITE, PPL, TEXT_SHA256, TOKENS, metric
from bs_exp.types import LoadedModel, Task, TokenWindows
from bs_exp.validation import check_at_least, check_choice

Average: TypeAlias = Literal["tokens", "windows"]

# Logits are widened to fp32 this many at a time (512 MiB), so that a large vocabulary costs no second copy of them all.
_LOGITS_PER_CHUNK = 2**27


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp of the mean loss per predicted token; the first token of a window has no context and is not predicted.

    `stride` below `sequence_length` makes windows overlap, and each counts only the tokens that are new in it.
    `tail` keeps or drops the shorter last window; `average` gives equal weight to tokens or to windows; `max_windows`
    evaluates that many full windows, evenly spaced over the text, and no tail. `special_tokens` puts those of the
    tokenizer around the whole text, where they count as its tokens, or with "per_window" around every window, where
    they are context that is not predicted, so that the first token of a window is. The papers' codes differ: Basis
    Sharing keeps the tail and averages over windows, SVD-LLM drops the tail.
    """

    corpora: Mapping[str, Corpus]
    sequence_length: int
    stride: int | None
    tail: Tail
    average: Average
    max_windows: int | None
    batch_size: int
    special_tokens: SpecialTokens

    def __post_init__(self) -> None:
        if not self.corpora:
            raise ConfigError("corpora is empty; name at least one, or leave the perplexity evaluator out.")
        # Two tokens are the least of which one is predicted.
        check_at_least(2, sequence_length=self.sequence_length)
        check_at_least(1, stride=self.stride, max_windows=self.max_windows, batch_size=self.batch_size)
        check_choice("tail", self.tail, get_args(Tail))
        check_choice("average", self.average, get_args(Average))
        check_special_tokens(self.special_tokens)
        if self.stride is not None and self.stride > self.sequence_length:
            raise ConfigError(
                f"stride must be at most sequence_length ({self.sequence_length}), got {self.stride}: "
                "tokens between the windows would be skipped. Use null for windows one after the other."
            )

    def content(self) -> Mapping[str, str]:
        return content_of(self.corpora)

    def texts(self) -> Mapping[str, EvaluatedWindows]:
        return {
            name: EvaluatedWindows(
                corpus=corpus,
                sequence_length=self.sequence_length,
                max_windows=self.max_windows,
                special_tokens=self.special_tokens,
                stride=self.stride,
                tail=self.tail,
            )
            for name, corpus in self.corpora.items()
        }

    def check(self, model: LoadedModel) -> None:
        """ConfigError for a model that does not predict the next token, or a window longer than its context."""
        check_task(model, "Perplexity of the next token", Task.CAUSAL_LM)
        check_length(self.sequence_length, model)

    def evaluate(self, model: LoadedModel) -> Mapping[str, float | str]:
        """`ppl/NAME`, the number of predicted tokens `ppl_tokens/NAME`, and the text's hash `ppl_text_sha256/NAME`.

        Losses that are not finite make the perplexity `inf`; `ppl_nonfinite/NAME` then counts them.
        """
        return self.evaluate_windows(model, cut_now(self.texts(), model))

    def evaluate_windows(self, model: LoadedModel, windows: Mapping[str, TokenWindows]) -> Mapping[str, float | str]:
        metrics: dict[str, float | str] = {}
        for name, cut in windows.items():
            check_fits(cut, model)
            losses = list(self._window_losses(cut, model, label=f"perplexity on {name}"))
            metrics[metric(PPL, name)] = perplexity_of(_mean(losses, self.average))
            metrics[metric(PPL, name, TOKENS)] = sum(len(window) for window in losses)
            metrics[metric(PPL, name, TEXT_SHA256)] = text_hash(cut)
            if nonfinite := int((~torch.cat(losses).isfinite()).sum()):
                metrics[metric(PPL, name, NONFINITE)] = nonfinite
        return metrics

    def _window_losses(
        self, windows: TokenWindows, model: LoadedModel, *, label: str
    ) -> Iterator[Float[Tensor, " new"]]:
        """Losses (nats, fp64) of the tokens that are new in each window, the tail last.

        Special tokens that were put around every window do not count.
        """
        before, after = map(len, windows.provenance.get("special_ids", ([], [])))
        length = self.sequence_length - before - after
        # The very first token of a window is not predicted.
        start, known = max(1, before), max(1, before + length - (self.stride or length))
        batches = list(torch.split(windows.ids, self.batch_size))
        if windows.tail is not None:
            batches.append(windows.tail[None])
        first = True
        own = processes.mine(batches)
        found = tracked(token_losses(model, own), label, total=len(own))
        for batch_losses in processes.put_together(list(found), len(batches)) if processes.count() > 1 else found:
            for losses in batch_losses:
                # The beginning of a window was counted in the one before; the first window has none before it.
                yield losses[(start if first else known) - 1 : len(losses) - after]
                first = False


def token_losses(
    model: LoadedModel, batches: Sequence[Int[Tensor, "batch length"]]
) -> Iterator[Float[Tensor, "batch length-1"]]:
    """By batch, cross entropy in nats of every token but the first, from logits in fp32; in fp64 on the CPU."""
    inputs = [{"input_ids": ids.to(model.device), "use_cache": False} for ids in batches]
    for ids, logits in zip(batches, logits_of(model, inputs), strict=True):
        with torch.inference_mode():
            found = _token_losses(logits, ids.to(logits.device))
        yield found


def _token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    rows = max(1, _LOGITS_PER_CHUNK // logits.shape[-1])
    losses = [
        functional.cross_entropy(some_logits.float(), targets, reduction="none")
        for sequence, following in zip(logits, ids[:, 1:], strict=True)
        for some_logits, targets in zip(sequence[:-1].split(rows), following.split(rows), strict=True)
    ]
    return torch.cat(losses).view(len(ids), -1).double().cpu()


def perplexity_of(mean_loss: float) -> float:
    """`exp(mean_loss)`, with the loss in nats per token; `inf` if it is not finite or the exp overflows."""
    try:
        return math.exp(mean_loss) if math.isfinite(mean_loss) else math.inf
    except OverflowError:
        return math.inf


def _mean(losses: list[Float[Tensor, " new"]], average: Average) -> float:
    """The mean over all tokens, or the mean over windows of their means, in nats."""
    if average == "tokens":
        return float(torch.cat(losses).mean())
    # A tail of one token predicts nothing, so it has no mean.
    return float(torch.stack([window.mean() for window in losses if len(window)]).mean())
