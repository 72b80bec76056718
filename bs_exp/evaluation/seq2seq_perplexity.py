"""Perplexity of the target of an encoder-decoder, given its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bs_exp.corpora.content import content_of
from bs_exp.corpora.evaluated import EvaluatedWindows
from bs_exp.evaluation.example_loss import example_perplexity
from bs_exp.evaluation.texts import check_text_settings, check_windows_fit, cut_now, texts_of
from bs_exp.models.model_inputs import check_task
from bs_exp.protocols import Corpus
from bs_exp.records.metrics import SEQ2SEQ_PPL
from bs_exp.types import Feeding, LoadedModel, Target, Task, TokenWindows


@dataclass(frozen=True, kw_only=True)
class Seq2SeqPerplexity:
    """exp of the mean loss per target token, given the source and the target's earlier tokens.

    `target` splits a window into source and target: with `continuation`, its first `source_share` and the rest; with
    `spans`, the tokens that stay and those that are cut out (`mask_share` of them, drawn by `seed` and the window's
    ids), with sentinels and the end token counted among the predicted.
    """

    corpora: Mapping[str, Corpus]
    sequence_length: int
    target: Target
    source_share: float
    mask_share: float
    max_windows: int | None
    batch_size: int
    special_tokens: bool
    seed: int

    def __post_init__(self) -> None:
        check_text_settings(self)

    @property
    def feeding(self) -> Feeding:
        return Feeding(target=self.target, source_share=self.source_share, mask_share=self.mask_share, seed=self.seed)

    def content(self) -> Mapping[str, str]:
        return content_of(self.corpora)

    def texts(self) -> Mapping[str, EvaluatedWindows]:
        return texts_of(self)

    def check(self, model: LoadedModel) -> None:
        """ConfigError for a model of another task, with too few positions, or whose tokenizer cannot mark spans."""
        check_task(model, "Perplexity of a decoder's target", Task.SEQ2SEQ_LM)
        check_windows_fit(self, model)

    def evaluate(self, model: LoadedModel) -> Mapping[str, float | str]:
        """`seq2seq_ppl/NAME`, and with it the number of tokens and the text's hash: see `example_perplexity`."""
        return self.evaluate_windows(model, cut_now(self.texts(), model))

    def evaluate_windows(self, model: LoadedModel, windows: Mapping[str, TokenWindows]) -> Mapping[str, float | str]:
        return example_perplexity(model, self, windows, SEQ2SEQ_PPL)
