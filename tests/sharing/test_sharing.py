"""Groups cover every matrix once, whatever the strategy."""

from __future__ import annotations

import pytest

from bs_exp.errors import ConfigError
from bs_exp.layout.plain import PlainLayout
from bs_exp.protocols import Sharing, SharingProblem
from bs_exp.sharing.adjacent import AdjacentSharing
from bs_exp.sharing.none import NoSharing
from bs_exp.types import Architecture, WeightMatrix


def architecture(layers: int = 5, **shapes: tuple[int, int]) -> Architecture:
    shapes = shapes or {"q": (8, 8), "k": (8, 4), "down": (20, 8)}
    matrices = tuple(
        WeightMatrix(matrix, layer, "site", f"layers.{layer}.{matrix}", d_in, d_out)
        for layer in range(layers)
        for matrix, (d_in, d_out) in shapes.items()
    )
    return Architecture(family="test", matrices=matrices)


def problem(architecture: Architecture) -> SharingProblem:
    return SharingProblem(architecture, retain_ratio=0.5, layout=PlainLayout())


STRATEGIES = [
    NoSharing(),
    *(AdjacentSharing(matrices=("q", "k"), group_size=size) for size in (1, 2, 3, 5)),
    AdjacentSharing(matrices=("q", "k", "down", "qkv"), group_size=4),
]


@pytest.mark.parametrize("sharing", STRATEGIES, ids=repr)
@pytest.mark.parametrize("layers", [5, 6, 7])
def test_every_matrix_is_in_exactly_one_group_of_its_shape(sharing: Sharing, layers: int) -> None:
    model = architecture(layers)
    groups = sharing.groups(problem(model))
    members = [(group.matrix, layer) for group in groups for layer in group.layers]
    assert sorted(members) == sorted(model.by_position)
    for group in groups:
        for layer in group.layers:
            matrix = model.by_position[group.matrix, layer]
            assert (group.d_in, group.d_out) == (matrix.d_in, matrix.d_out)
    assert sum(group.parameters for group in groups) == model.parameters
    assert groups == sharing.groups(problem(model))


def test_remainder_is_a_smaller_group_and_unlisted_types_stay_alone() -> None:
    groups = AdjacentSharing(matrices=["q"], group_size=2).groups(problem(architecture(5)))  # type: ignore[arg-type]
    assert [g.layers for g in groups if g.matrix == "q"] == [(0, 1), (2, 3), (4,)]
    assert [g.layers for g in groups if g.matrix == "down"] == [(0,), (1,), (2,), (3,), (4,)]


def test_size_one_is_no_sharing() -> None:
    assert AdjacentSharing(matrices=("q", "k"), group_size=1).groups(problem(architecture())) == NoSharing().groups(
        problem(architecture())
    )


def test_layers_of_another_shape_start_a_new_group() -> None:
    narrow, wide = architecture(2, q=(8, 8)), architecture(4, q=(8, 16))
    mixed = Architecture("test", (*narrow.matrices, *(m for m in wide.matrices if m.layer >= 2)))
    groups = AdjacentSharing(matrices=("q",), group_size=3).groups(problem(mixed))
    assert [(g.layers, g.d_out) for g in groups] == [((0, 1), 8), ((2, 3), 16)]


@pytest.mark.parametrize("size", [0, -1, 6])
def test_group_size_out_of_range(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"group_size must be .*got {size}"):
        AdjacentSharing(matrices=("q",), group_size=size).groups(problem(architecture(5)))


def test_types_that_the_model_lacks() -> None:
    with pytest.raises(ConfigError, match=r"\['gate'\] names no matrix type .*'down'"):
        AdjacentSharing(matrices=("gate",), group_size=2).groups(problem(architecture()))
    with pytest.raises(ConfigError, match="gaet is no matrix type"):
        AdjacentSharing(matrices=("q", "gaet"), group_size=2).groups(problem(architecture()))
    with pytest.raises(ConfigError, match="whole number of at least 1, got 'two'"):
        AdjacentSharing(matrices=("q",), group_size="two")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="empty"):
        AdjacentSharing(matrices=(), group_size=2)
