"""Sizes counted on real modules: each stored tensor once."""

from __future__ import annotations

import torch

from bs_exp.evaluation.size import measure_size, stored_bytes
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.surgery import replace_matrices, twin
from bs_exp.models.tiny import tiny_random
from bs_exp.types import CompressedModel, LoadedModel, PlannedGroup, RankPlan, SharedFactors, WeightGroup


def _compress(dense: LoadedModel, groups: list[WeightGroup], rank: int) -> CompressedModel:
    factors = [
        SharedFactors(g, torch.randn(g.d_in, rank), {layer: torch.randn(rank, g.d_out) for layer in g.layers})
        for g in groups
    ]
    module = twin(dense.module)
    replace_matrices(module, dense.architecture, factors, PlainLayout())
    planned = [PlannedGroup(g, rank, rank * (g.d_in + g.columns), 0.0, 0.0) for g in groups]
    return CompressedModel(module, RankPlan(tuple(planned), 0.5), {}, (0.5,))


def test_a_shared_basis_counts_once() -> None:
    dense = tiny_random("llama")
    compressed = _compress(dense, [WeightGroup("q", (0, 1), 32, 32), WeightGroup("up", (2,), 32, 48)], rank=4)
    size = measure_size(dense, compressed, compressed.plan)
    targeted, kept = 2 * 32 * 32 + 32 * 48, 4 * (32 + 2 * 32) + 4 * (32 + 48)
    total = dense.module.num_parameters()
    assert size["targeted_parameters"] == kept == compressed.plan.parameters
    assert size["dense_targeted_parameters"] == targeted
    assert size["retain_ratio"] == kept / targeted
    assert size["dense_parameters"] == total
    assert size["parameters"] == total - targeted + kept
    assert size["model_retain_ratio"] == (total - targeted + kept) / total
    assert size["dense_bytes"] - size["bytes"] == 4 * (targeted - kept)


def test_biases_are_in_the_model_but_not_in_the_targeted_matrices() -> None:
    dense = tiny_random("opt")
    compressed = _compress(dense, [WeightGroup("q", (0, 1), 32, 32)], rank=4)
    size = measure_size(dense, compressed, compressed.plan)
    assert (size["dense_targeted_parameters"], size["targeted_parameters"]) == (2 * 32 * 32, 4 * 96)
    assert size["dense_parameters"] - size["parameters"] == 2 * 32 * 32 - 4 * 96


def test_groups_left_dense_keep_everything() -> None:
    dense = tiny_random("llama")
    group = WeightGroup("q", (0, 1, 2), 32, 32)
    plan = RankPlan((PlannedGroup(group, None, group.parameters, 0.0, 0.0),), 1.0)
    size = measure_size(dense, dense, plan)
    assert size["retain_ratio"] == size["model_retain_ratio"] == 1.0
    assert size["bytes"] == size["dense_bytes"]


def test_tied_embeddings_are_stored_once_and_bytes_follow_the_dtype() -> None:
    dense = tiny_random("gpt2").module
    assert dense.get_input_embeddings().weight is dense.get_output_embeddings().weight
    assert stored_bytes(dense) == 4 * dense.num_parameters()
    assert stored_bytes(dense.bfloat16()) == 2 * dense.num_parameters()
