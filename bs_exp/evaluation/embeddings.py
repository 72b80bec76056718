"""Embeddings of texts by a compressed model, compared with those by its dense original."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from bs_exp import processes
from bs_exp.corpora.content import content_of
from bs_exp.corpora.sampling import evenly_spaced
from bs_exp.corpora.windows import check_length, cut_windows
from bs_exp.errors import ConfigError, DataError
from bs_exp.evaluation.text_embeddings import embeddings_of, token_rows
from bs_exp.evaluation.texts import tracked
from bs_exp.models.model_inputs import check_task
from bs_exp.protocols import Corpus
from bs_exp.records import metrics as names
from bs_exp.records.metrics import TEXT_SHA256, metric
from bs_exp.types import LoadedModel, Task
from bs_exp.validation import check_at_least, check_choice

Unit: TypeAlias = Literal["lines", "windows"]

NEIGHBOURS = 10


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """How close the embeddings of texts are to the dense model's, and how alike both order the texts.

    Texts are the non-empty lines of a corpus, cut at `sequence_length` tokens, or windows of so many (`unit`); at most
    `max_texts`, evenly spaced. Embeddings are pooled as a sentence-transformers model says, else the mean over tokens;
    the tokenizer's special tokens stand around every text.
    """

    corpora: Mapping[str, Corpus]
    unit: Unit
    sequence_length: int
    max_texts: int | None
    batch_size: int

    def __post_init__(self) -> None:
        if not self.corpora:
            raise ConfigError("corpora is empty; name at least one, or leave the evaluator out.")
        check_choice("unit", self.unit, get_args(Unit))
        check_at_least(2, sequence_length=self.sequence_length)
        check_at_least(NEIGHBOURS + 2, max_texts=self.max_texts)
        check_at_least(1, batch_size=self.batch_size)

    def content(self) -> Mapping[str, str]:
        return content_of(self.corpora)

    def check(self, model: LoadedModel) -> None:
        """ConfigError for an encoder-decoder, or a model with too few positions."""
        check_task(model, "A comparison of embeddings", Task.ENCODER, Task.MASKED_LM, Task.CAUSAL_LM)
        check_length(self.sequence_length, model)

    def evaluate(self, model: LoadedModel) -> Mapping[str, float | str]:
        """By corpus: `embedding_cosine/NAME`, the mean cosine to the dense embedding; `embedding_spearman/NAME`, the
        rank correlation of the cosines of all pairs of texts in both models; `embedding_overlap10/NAME`, the share of
        the ten nearest texts that both agree on, averaged over the texts.

        Also `embedding_texts/NAME`, their number, and `embedding_text_sha256/NAME`. DataError for fewer than 12 texts.
        """
        found: dict[str, float | str] = {}
        for name, corpus in self.corpora.items():
            text, origin = corpus.read()
            rows = self._rows(text, model)
            label = f"embeddings of {name}"
            own = self._embeddings(model, rows, label)
            dense = own if model.original is None else self._embeddings(model.original, rows, label)
            found[metric(names.EMBEDDING_COSINE, name)] = float((own * dense).sum(-1).mean())
            found[metric(names.EMBEDDING_SPEARMAN, name)] = rank_correlation(own, dense)
            found[metric(names.EMBEDDING_OVERLAP, name)] = neighbour_overlap(own, dense)
            found[metric(names.EMBEDDING_TEXTS, name)] = len(rows)
            found[metric(names.EMBEDDING, name, TEXT_SHA256)] = str(origin["fingerprint"])
        return found

    def _rows(self, text: str, model: LoadedModel) -> Sequence[Sequence[int]]:
        """Token ids of every text that is compared."""
        if self.unit == "windows":
            cut = cut_windows(
                text, model.tokenizer, sequence_length=self.sequence_length, special_tokens="per_window"
            ).ids
            rows: Sequence[Sequence[int]] = cut[evenly_spaced(len(cut), self.max_texts)].tolist()
        else:
            lines = [line for line in map(str.strip, text.splitlines()) if line]
            chosen = [lines[i] for i in evenly_spaced(len(lines), self.max_texts)]
            rows = token_rows(chosen, model, length=self.sequence_length)
        if len(rows) < NEIGHBOURS + 2:
            raise DataError(
                f"Embeddings are compared on {NEIGHBOURS + 2} texts at least, got {len(rows)} {self.unit} of "
                f"{self.sequence_length} tokens. Use a longer text, a smaller evaluation.sequence_length, or the other "
                "evaluation.unit."
            )
        return rows

    def _embeddings(self, model: LoadedModel, rows: Sequence[Sequence[int]], label: str) -> Float[Tensor, "texts d"]:
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        own = processes.mine(batches)
        found = [embeddings_of(batch, model) for batch in tracked(own, label, total=len(own))]
        return torch.cat(processes.put_together(found, len(batches)))


def rank_correlation(own: Float[Tensor, "texts d"], dense: Float[Tensor, "texts d"]) -> float:
    """Spearman's correlation between the cosines of all pairs of texts; 0 where a model does not order them at all."""
    first, second = torch.triu_indices(len(own), len(own), offset=1)
    pairs = [(rows @ rows.T)[first, second].numpy() for rows in (own, dense)]
    if any(float(values.max() - values.min()) == 0.0 for values in pairs):
        return 0.0
    found = float(stats.spearmanr(*pairs).statistic)
    return found if math.isfinite(found) else 0.0


def neighbour_overlap(own: Float[Tensor, "texts d"], dense: Float[Tensor, "texts d"]) -> float:
    """The share of the ten nearest other texts, by cosine, that are the same in both models."""
    shared = 0
    nearest = []
    for rows in (own, dense):
        cosines = rows @ rows.T
        cosines.fill_diagonal_(-math.inf)
        nearest.append(cosines.topk(NEIGHBOURS).indices.tolist())
    for mine, theirs in zip(*nearest, strict=True):
        shared += len(set(mine) & set(theirs))
    return shared / (NEIGHBOURS * len(own))
