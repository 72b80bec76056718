"""Experts of one layer may share a basis, by every strategy that shares neighbours or clusters."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

from bs_exp.cache import Cache
from bs_exp.errors import ConfigError
from bs_exp.models.experts import PARTS
from bs_exp.models.modeling_basis_sharing import SharedLinear
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress
from bs_exp.progress import Progress
from bs_exp.protocols import Sharing
from bs_exp.sharing.adjacent import AdjacentSharing
from bs_exp.sharing.explicit import ExplicitSharing
from bs_exp.testing.measures import problem, random_measures
from bs_exp.types import Architecture, ExpertPlace, LossUnit, RankPlan, WeightGroup, WeightMatrix, block_of
from bs_exp.workspace import Workspace
from tests.support.options import strategy
from tests.support.recipes import RECIPE


def mixture(layers: int = 2, experts: int = 5) -> Architecture:
    """Layers with one q and many experts each."""
    routed = [
        WeightMatrix("expert_up", layer, f"expert_in.{e}", f"layers.{layer}.{e}", 8, 6, expert=e)
        for layer in range(layers)
        for e in range(experts)
    ]
    dense = [WeightMatrix("q", layer, "site", f"layers.{layer}.q", 8, 8) for layer in range(layers)]
    return Architecture("test", (*dense, *routed))


def places(*pairs: tuple[int, int]) -> tuple[ExpertPlace, ...]:
    return tuple(ExpertPlace(*pair) for pair in pairs)


def test_a_place_is_a_number_that_knows_its_layer_and_expert() -> None:
    place = ExpertPlace(2, 7)
    assert (block_of(place), place.layer, place.expert, str(place), block_of(3)) == (2, 2, 7, "2.7", 3)
    assert sorted(places((1, 0), (0, 9), (0, 2))) == list(places((0, 2), (0, 9), (1, 0)))
    for again in (copy.deepcopy(place), pickle.loads(pickle.dumps(place)), copy.copy(place)):
        assert again == place and (again.layer, again.expert) == (2, 7)
    assert len({place, ExpertPlace(2, 7), ExpertPlace(7, 2)}) == 2
    assert ExpertPlace(0, 0) not in range(10_000)
    for layer, expert in ((-1, 0), (0, -1), (0, ExpertPlace.MOST_EXPERTS)):
        with pytest.raises(ValueError, match="the layer of an expert must be at least 0"):
            ExpertPlace(layer, expert)


def test_a_group_of_experts_lies_in_their_layers() -> None:
    group = WeightGroup("expert_up", places((0, 1), (0, 4), (3, 0)), 8, 6)
    assert (group.name, group.blocks, group.size, group.is_routed) == ("expert_up[0.1,0.4,3.0]", (0, 3), 3, True)
    assert group.within(0) == group.layers[:2] and group.within(1) == ()
    plain = WeightGroup("q", (0, 2), 8, 8)
    assert (plain.blocks, plain.within(2), plain.is_routed) == ((0, 2), (2,), False)


def test_neighbours_are_experts_of_one_layer() -> None:
    groups = AdjacentSharing(matrices=("q", "expert_up"), group_size=2).groups(problem(mixture()))
    assert [g.layers for g in groups if g.matrix == "q"] == [(0, 1)]
    assert [g.name for g in groups if g.is_routed] == [
        *("expert_up[0.0,0.1]", "expert_up[0.2,0.3]", "expert_up[0.4]"),
        *("expert_up[1.0,1.1]", "expert_up[1.2,1.3]", "expert_up[1.4]"),
    ]


def test_a_group_may_have_as_many_members_as_a_layer_has_experts() -> None:
    [first, _] = AdjacentSharing(matrices=("expert_up",), group_size=5).groups(problem(mixture()))[2:]
    assert first.layers == places(*((0, e) for e in range(5)))
    with pytest.raises(ConfigError, match=r"between 1 and 5 \(experts in a layer of this test model\), got 6"):
        AdjacentSharing(matrices=("expert_up",), group_size=6).groups(problem(mixture()))


@pytest.mark.parametrize(
    "row",
    [
        "sharing=clustered sharing.matrices=[expert_up] sharing.max_size=3",
        "sharing=criterion sharing.matrices=[expert_up] sharing.max_size=3",
        "sharing=optimal sharing.matrices=[expert_up] sharing.g_max=3",
    ],
)
def test_measured_strategies_join_experts_that_are_alike(row: str) -> None:
    """In these measures every second member is alike."""
    model, unit = mixture(experts=6), LossUnit.NATS if "optimal" in row else LossUnit.OUTPUT_NORM
    sharing: Sharing = strategy(row)
    groups = sharing.groups(problem(model, random_measures(model, unit=unit)))
    assert sorted(place for g in groups if g.is_routed for place in g.layers) == [
        m.place for m in model.of_type("expert_up")
    ]
    assert all(len(g.blocks) == 1 for g in groups if g.is_routed)
    if "clustered" in row:
        assert WeightGroup("expert_up", places((0, 0), (0, 2), (0, 4)), 8, 6) in groups


def test_any_experts_can_be_listed() -> None:
    layers = {"expert_up": [[[0, 3], [0, 1]], [[0, 0], [1, 2]]]}
    groups = ExplicitSharing(layers=layers).groups(problem(mixture()))  # type: ignore[arg-type]
    names = [g.name for g in groups if g.is_routed]
    assert names[:3] == ["expert_up[0.0,1.2]", "expert_up[0.1,0.3]", "expert_up[0.2]"] and len(names) == 8
    for wrong, message in {
        "[[0]]": r"names layer 0, but expert_up is in experts 0-4 of layers 0-1, each named \[layer, expert\]",
        "[[[0, 9]]]": r"names layer 0\.9, but expert_up is in experts 0-4",
        "[[[0, 1], [0, 1]]]": r"names layer 0\.1 twice",
        "[[[0, -1]]]": r"whole numbers from 0, got \[0, -1\]; an expert is named \[layer, expert\]",
        "[[[0, 70000]]]": "no layer has an expert of the number 70000",
        "[[[0, 1, 2]]]": r"whole numbers from 0, got \[0, 1, 2\]",
    }.items():
        with pytest.raises(ConfigError, match=message):
            ExplicitSharing(layers={"expert_up": json.loads(wrong)}).check(mixture())


@pytest.mark.parametrize(
    "row",
    [
        "sharing=paper sharing.matrices=[expert_gate,expert_up,expert_down] sharing.group_size=4",
        "sharing=residual sharing.matrices=[expert_gate,expert_up] sharing.group_size=2 sharing.residual_rank=1",
        "sharing=clustered sharing.matrices=[expert_gate,expert_up,q] sharing.max_size=2",
        "sharing=explicit sharing.layers={expert_gate:[[[0,0],[1,3]]]}",
        "sharing=heads sharing.matrices=[q,expert_up] sharing.group_size=2",
    ],
)
def test_shared_experts_hold_one_basis_and_their_plan_can_be_read_back(row: str) -> None:
    dense = tiny_random("mixtral", layers=2)
    sharing: Any = strategy(row)
    found = compress(dense, replace(RECIPE, sharing=sharing), Workspace(Cache(None), Progress(quiet=True)))
    shared = [p.group for p in found.plan.groups if p.group.is_routed and p.group.size > 1 and p.rank is not None]
    assert shared
    parts = {matrix: name for name, matrix in PARTS.items()}
    for group in shared:
        layers = []
        for place in group.layers:
            assert isinstance(place, ExpertPlace)
            path = f"model.layers.{place.layer}.mlp.experts.members.{place.expert}.{parts[group.matrix]}"
            layer = found.module.get_submodule(path)
            layers.append(getattr(layer, "shared", layer))
        assert all(isinstance(layer, SharedLinear) and layer.basis is layers[0].basis for layer in layers)
    again = RankPlan.from_dict(json.loads(json.dumps(found.plan.to_dict())))
    assert again == found.plan and [g.group.name for g in again.groups] == [g.group.name for g in found.plan.groups]


def test_the_basis_of_experts_is_the_best_one_for_their_stacked_inputs() -> None:
    """Oracle: the leading left singular directions of `S [W_1 .. W_n]` with `S^T S` the sum of the experts' Grams."""
    model = mixture(layers=1, experts=3)
    measures = random_measures(model)
    group = WeightGroup("expert_up", places((0, 0), (0, 1), (0, 2)), 8, 6)
    stacked = torch.linalg.cholesky(torch.stack([measures.grams["expert_up", p] for p in group.layers]).sum(0)).mT
    wanted = torch.linalg.svdvals(stacked @ torch.cat([measures.weights["expert_up", p] for p in group.layers], dim=1))
    torch.testing.assert_close(measures.spectrum(group).singular_values, wanted, rtol=1e-6, atol=1e-6)
