"""What is measured has the memory layout of what is loaded: kernels look at strides, also at those of sides of 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.architecture import find_architecture
from bs_exp.models.surgery import replace_matrices, to_dense, twin
from bs_exp.protocols import Layout
from bs_exp.types import SharedFactors, WeightGroup


def model(layout: Layout, rank: int, correction: int) -> PreTrainedModel:
    """In fp16, with an odd width of the feed-forward part; pairs share, and every group has the same rank."""
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=31,
        vocab_size=64,
    )
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
    architecture, made = find_architecture(dense, None), twin(dense)
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return 0.5 * torch.randn(*shape, generator=random, dtype=torch.float64)

    def factors(matrix: str) -> SharedFactors:
        first, second = architecture.of_type(matrix)
        group = WeightGroup(matrix, (first.layer, second.layer), first.d_in, first.d_out, correction)
        own = {i: (normal(group.d_in, correction), normal(correction, group.d_out)) for i in group.layers if correction}
        return SharedFactors(group, normal(group.d_in, rank), {i: normal(rank, group.d_out) for i in group.layers}, own)

    replace_matrices(made, architecture, map(factors, architecture.matrix_types), layout)
    return made


@torch.no_grad()
def logits_of(module: PreTrainedModel) -> Tensor:
    found: Tensor = module(torch.arange(60).view(4, 15)).logits
    return found


def canonical(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape).stride()


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize(("layout", "rank"), [(PlainLayout(), 1), (PivotedLayout(), 1), (PivotedLayout(), 30)])
def test_saved_is_what_was_measured(layout: Layout, rank: int, correction: int, tmp_path: Path) -> None:
    """With a rank of 1 factors have a side of 1; pivoted, so has the basis of rank 30 where 31 inputs have pivots."""
    made = model(layout, rank, correction)
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = loaded.state_dict()
    assert any(1 in value.shape for value in again.values())
    for name, value in made.state_dict().items():
        assert value.stride() == again[name].stride() == canonical(value.shape), name
    assert loaded.dtype is torch.float16
    assert torch.equal(logits_of(loaded), logits_of(made))
    for name, value in to_dense(made).state_dict().items():
        assert value.stride() == canonical(value.shape), name
