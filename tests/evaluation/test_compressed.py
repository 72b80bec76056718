"""Compressed models go through the same calls as dense ones, and stay what they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bs_exp.corpora.python_docs import PythonDocs
from bs_exp.evaluation.accuracy import Accuracy
from bs_exp.evaluation.perplexity import Perplexity
from bs_exp.evaluation.throughput import Throughput
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.surgery import replace_matrices, to_dense, twin
from bs_exp.models.tiny import tiny_random
from bs_exp.protocols import Evaluator
from bs_exp.types import LoadedModel, SharedFactors, WeightGroup

PERPLEXITY = Perplexity(
    corpora={"docs": PythonDocs(split="heldout")},
    sequence_length=64,
    stride=None,
    tail="drop",
    average="tokens",
    max_windows=4,
    batch_size=2,
    special_tokens=False,
)
ACCURACY = Accuracy(tasks=["docs_cloze"], limit=8, num_fewshot=None, batch_size=4, seed=0, include_path=[])


@pytest.fixture
def compressed() -> LoadedModel:
    """q of layers 0 and 1 shared, the rest dense."""
    dense = tiny_random("llama")
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(32, 4, generator=generator)
    coefficients = {layer: torch.randn(4, 32, generator=generator) for layer in (0, 1)}
    module = twin(dense.module)
    group = WeightGroup("q", (0, 1), 32, 32)
    replace_matrices(module, dense.architecture, [SharedFactors(group, basis, coefficients)], PlainLayout())
    return replace(dense, module=module)


@pytest.mark.parametrize("evaluator", [PERPLEXITY, ACCURACY], ids=["perplexity", "accuracy"])
def test_factors_score_like_their_products(compressed: LoadedModel, evaluator: Evaluator) -> None:
    products = replace(compressed, module=to_dense(compressed.module))
    measured, expected = evaluator.evaluate(compressed), evaluator.evaluate(products)
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        assert measured[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), name
    first, second = (compressed.module.model.layers[layer].self_attn.q_proj for layer in (0, 1))
    assert first.basis is second.basis


def test_factors_are_timed(compressed: LoadedModel) -> None:
    timing = Throughput(batch_size=2, prompt_length=8, generated_length=2, repeats=1, warmup=0, seed=0)
    assert timing.evaluate(compressed)["throughput/decode_tok_s"] > 0
