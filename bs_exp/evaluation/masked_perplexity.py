"""Perplexity of masked tokens, for encoders with a masked-token head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bs_exp.corpora.content import content_of
from bs_exp.corpora.evaluated import EvaluatedWindows
from bs_exp.evaluation.example_loss import example_perplexity
from bs_exp.evaluation.texts import check_text_settings, check_windows_fit, cut_now, texts_of
from bs_exp.models.model_inputs import check_task
from bs_exp.protocols import Corpus
from bs_exp.records.metrics import MASKED_PPL
from bs_exp.types import Feeding, LoadedModel, Task, TokenWindows


@dataclass(frozen=True, kw_only=True)
class MaskedPerplexity:
    """exp of the mean of `-log p(token | window with some of its tokens masked)` over the masked tokens.

    In each window `round(mask_share * sequence_length)` tokens (at least one) are replaced by the mask token, all at
    once and all of them (no random or kept tokens), drawn by `seed` and the window's ids: dense and compressed models
    get the same masks. A cheap variant of pseudo-perplexity, which masks one token at a time and so sees more context
    (Salazar et al., 1910.14659, section 2.1); numbers of different `mask_share` cannot be compared.
    """

    corpora: Mapping[str, Corpus]
    sequence_length: int
    mask_share: float
    max_windows: int | None
    batch_size: int
    special_tokens: bool
    seed: int

    def __post_init__(self) -> None:
        check_text_settings(self)

    @property
    def feeding(self) -> Feeding:
        return Feeding(mask_share=self.mask_share, seed=self.seed)

    def content(self) -> Mapping[str, str]:
        return content_of(self.corpora)

    def texts(self) -> Mapping[str, EvaluatedWindows]:
        return texts_of(self)

    def check(self, model: LoadedModel) -> None:
        """ConfigError for a model of another task, or with too few positions."""
        check_task(model, "Perplexity of masked tokens", Task.MASKED_LM)
        check_windows_fit(self, model)

    def evaluate(self, model: LoadedModel) -> Mapping[str, float | str]:
        """`masked_ppl/NAME`, and with it the number of tokens and the text's hash: see `example_perplexity`."""
        return self.evaluate_windows(model, cut_now(self.texts(), model))

    def evaluate_windows(self, model: LoadedModel, windows: Mapping[str, TokenWindows]) -> Mapping[str, float | str]:
        return example_perplexity(model, self, windows, MASKED_PPL)
