"""Models with random factors in place of every matrix: groups of two, with one layer left over."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bs_exp.layout.plain import PlainLayout
from bs_exp.models.surgery import replace_matrices, twin
from bs_exp.protocols import Layout
from bs_exp.types import Architecture, LoadedModel, SharedFactors, WeightGroup

RANK = 4


def random_factors(architecture: Architecture) -> Iterator[SharedFactors]:
    """fp64 factors of rank 4; the leftover groups have rank 3."""
    random = torch.Generator().manual_seed(0)
    for matrix in architecture.matrix_types:
        members = architecture.of_type(matrix)
        for start in range(0, len(members), 2):
            part = members[start : start + 2]
            group = WeightGroup(matrix, tuple(m.layer for m in part), part[0].d_in, part[0].d_out)
            rank = RANK if group.size == 2 else RANK - 1
            basis = torch.randn(group.d_in, rank, generator=random, dtype=torch.float64)
            coefficients = {
                layer: 0.1 * torch.randn(rank, group.d_out, generator=random, dtype=torch.float64)
                for layer in group.layers
            }
            yield SharedFactors(group, basis, coefficients)


def compressed_twin(dense: LoadedModel, layout: Layout | None = None) -> PreTrainedModel:
    module, layout = twin(dense.module), layout or PlainLayout()
    replace_matrices(module, dense.architecture, random_factors(dense.architecture), layout)
    return module


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    return model(torch.arange(24).view(2, 12)).logits
