"""Embeddings against the definitions of their metrics: numpy's and scipy's, text by text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from bs_exp.corpora.given_texts import GivenTexts
from bs_exp.errors import ConfigError, DataError
from bs_exp.evaluation.embeddings import Embeddings, neighbour_overlap, rank_correlation
from bs_exp.models.tiny import tiny_random
from bs_exp.types import LoadedModel, Pooling
from tests.support.encoders import headless

LINES = [f"line {number} of a text " + "and of what is in it"[: number % 17] + "." for number in range(30)]
CORPUS = GivenTexts(texts=["\n\n".join(LINES)])
EMBEDDINGS = Embeddings(corpora={"lines": CORPUS}, unit="lines", sequence_length=32, max_texts=20, batch_size=7)


def pair() -> LoadedModel:
    """A model whose original is another one."""
    original = replace(headless(), pooling=Pooling(modes=("mean",)))
    other = headless(seed=0)
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return replace(original, module=other.module, original=original)


def alone(model: LoadedModel, text: str) -> np.ndarray:
    ids = model.tokenizer(text, truncation=True, max_length=32, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model.module(input_ids=ids).last_hidden_state[0].double().numpy().mean(0)
    return found / np.linalg.norm(found)  # type: ignore[no-any-return]


def test_the_metrics_are_those_of_each_text_alone() -> None:
    model = pair()
    assert model.original is not None
    assert EMBEDDINGS.evaluate(model)["embedding_texts/lines"] == 20
    own, dense = (np.stack([alone(m, text) for text in LINES]) for m in (model, model.original))
    all_lines = replace(EMBEDDINGS, max_texts=None).evaluate(model)
    assert all_lines["embedding_cosine/lines"] == pytest.approx((own * dense).sum(1).mean(), abs=1e-5)
    pairs = [(rows @ rows.T)[np.triu_indices(30, 1)] for rows in (own, dense)]
    assert all_lines["embedding_spearman/lines"] == pytest.approx(stats.spearmanr(*pairs).statistic, abs=1e-3)
    near = [
        [set(np.argsort(-row, kind="stable")[1:11]) for row in rows @ rows.T + 9 * np.eye(30)] for rows in (own, dense)
    ]
    overlap = np.mean([len(a & b) / 10 for a, b in zip(*near, strict=True)])
    assert all_lines["embedding_overlap10/lines"] == pytest.approx(overlap, abs=0.02)
    assert 0.2 < overlap < 1.0


@pytest.mark.parametrize("unit", ["lines", "windows"])
def test_the_dense_model_is_its_own_measure(unit: str) -> None:
    found = replace(EMBEDDINGS, unit=unit, sequence_length=16).evaluate(headless())
    for kind in ("cosine", "spearman", "overlap10"):
        assert found[f"embedding_{kind}/lines"] == pytest.approx(1.0)


def test_what_has_no_order_correlates_with_nothing() -> None:
    same, other = torch.ones(12, 2).double() / 2**0.5, torch.randn(12, 2).double()
    assert rank_correlation(same, other) == 0.0
    assert neighbour_overlap(other, other) == 1.0


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"embeddings needs an encoder.*evaluation=seq2seq"):
        EMBEDDINGS.check(tiny_random("t5"))
    with pytest.raises(DataError, match="on 12 texts at least, got 3 lines of 32 tokens"):
        replace(EMBEDDINGS, corpora={"few": GivenTexts(texts=["a\nb\nc"])}).evaluate(headless())
    with pytest.raises(ConfigError, match=r"^max_texts must be a whole number of at least 12"):
        replace(EMBEDDINGS, max_texts=5)
