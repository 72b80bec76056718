"""Similarity of a compressed model's hidden states to those of its dense original."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from bs_exp import processes
from bs_exp.corpora.content import content_of
from bs_exp.corpora.evaluated import EvaluatedWindows, text_hash
from bs_exp.corpora.windows import check_fits
from bs_exp.evaluation.texts import check_text_settings, check_windows_fit, cut_now, texts_of, tracked
from bs_exp.models.model_inputs import feeder
from bs_exp.models.outputs import hidden_states_of
from bs_exp.protocols import Corpus
from bs_exp.records.metrics import COSINE, RELATIVE_ERROR, SIMILARITY, TEXT_SHA256, TOKENS, metric
from bs_exp.types import Feeding, LoadedModel, Target, TokenWindows


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Similarity of a model's last hidden states to those of its dense original, on windows without masks.

    For every model, with a head or without. An encoder-decoder's states are those of its decoder, which reads the
    target; `target`, `source_share`, `mask_share` and `seed` feed it as in `Seq2SeqPerplexity`, and other models ignore
    them.
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
        """ConfigError if the model has too few positions, or its tokenizer cannot mark spans."""
        check_windows_fit(self, model)

    def evaluate(self, model: LoadedModel) -> Mapping[str, float | str]:
        """`cosine/NAME`, the mean cosine over positions, and `relative_error/NAME`, `||H - H_0||_F / ||H_0||_F`.

        Also `similarity_tokens/NAME`, the number of positions, and `similarity_text_sha256/NAME`. The dense model is
        compared with itself, which gives 1 and 0.
        """
        return self.evaluate_windows(model, cut_now(self.texts(), model))

    def evaluate_windows(self, model: LoadedModel, windows: Mapping[str, TokenWindows]) -> Mapping[str, float | str]:
        metrics: dict[str, float | str] = {}
        for name, cut in windows.items():
            fed = replace(cut, feeding=self.feeding)
            check_fits(fed, model)
            cosine, error, tokens = self._compare(model, fed, f"similarity on {name}")
            metrics[metric(COSINE, name)] = cosine
            metrics[metric(RELATIVE_ERROR, name)] = error
            metrics[metric(SIMILARITY, name, TOKENS)] = tokens
            metrics[metric(SIMILARITY, name, TEXT_SHA256)] = text_hash(cut)
        return metrics

    def _compare(self, model: LoadedModel, windows: TokenWindows, label: str) -> tuple[float, float, int]:
        """Mean cosine, relative error, and the number of positions, summed in fp64."""
        reader = feeder(model, windows.feeding)
        original = model.original or model
        sums: list[tuple[float, float, float, int]] = []
        batches = windows.ids.split(self.batch_size)
        inputs = [reader.inputs(ids.to(model.device)) for ids in processes.mine(batches)]
        wanted = hidden_states_of(original, inputs)
        pairs = (
            ((states, states) for states in wanted)
            if original is model
            else zip(wanted, hidden_states_of(model, inputs), strict=True)
        )
        for expected_states, found_states in tracked(pairs, label, total=len(inputs)):
            with torch.inference_mode():
                expected = expected_states.flatten(0, 1).double()
                found = found_states.flatten(0, 1).double()
                cosine = functional.cosine_similarity(found, expected, dim=-1).sum()
                difference, size = (found - expected).square().sum(), expected.square().sum()
                sums.append((float(cosine), float(difference), float(size), len(found)))
        cosines, differences, sizes, tokens = map(sum, zip(*processes.put_together(sums, len(batches)), strict=True))
        return cosines / tokens, math.sqrt(differences / sizes), int(tokens)
