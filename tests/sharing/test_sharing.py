"""Groups of neighbours, and groups as they are listed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bs_exp.errors import ConfigError
from bs_exp.sharing.adjacent import AdjacentSharing
from bs_exp.sharing.explicit import ExplicitSharing
from bs_exp.sharing.none import NoSharing
from bs_exp.testing.measures import architecture, problem
from bs_exp.types import Architecture


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


def test_a_size_for_each_type() -> None:
    sizes = {"q": 2, "k": 3}
    groups = AdjacentSharing(matrices=("q", "k", "down"), group_size=sizes).groups(problem(architecture(5)))
    assert [g.layers for g in groups if g.matrix == "q"] == [(0, 1), (2, 3), (4,)]
    assert [g.layers for g in groups if g.matrix == "k"] == [(0, 1, 2), (3, 4)]
    assert all(g.size == 1 for g in groups if g.matrix == "down")
    same = AdjacentSharing(matrices=("q", "k"), group_size={"q": 3, "k": 3}).groups(problem(architecture(5)))
    assert same == AdjacentSharing(matrices=("q", "k"), group_size=3).groups(problem(architecture(5)))
    with pytest.raises(ConfigError, match=r"group_size\.k must be between 1 and 5 .*got 6"):
        AdjacentSharing(matrices=("q", "k"), group_size={"k": 6}).groups(problem(architecture(5)))
    with pytest.raises(ConfigError, match=r"group_size\.k must be a whole number of at least 1, got 0"):
        AdjacentSharing(matrices=("q", "k"), group_size={"k": 0})
    with pytest.raises(ConfigError, match=r"a size for down, but matrices is \['q'\]"):
        AdjacentSharing(matrices=("q",), group_size={"down": 2})


def test_explicit_lists_are_the_groups() -> None:
    groups = ExplicitSharing(layers={"q": [[4, 1], [2, 3]], "k": [[0, 4]]}).groups(problem(architecture(5)))
    assert [g.layers for g in groups if g.matrix == "q"] == [(0,), (1, 4), (2, 3)]
    assert [g.layers for g in groups if g.matrix == "k"] == [(0, 4), (1,), (2,), (3,)]
    assert [g.layers for g in groups if g.matrix == "down"] == [(0,), (1,), (2,), (3,), (4,)]
    pairs = AdjacentSharing(matrices=("q",), group_size=2).groups(problem(architecture(5)))
    assert ExplicitSharing(layers={"q": [[0, 1], [2, 3]]}).groups(problem(architecture(5))) == pairs


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (None, r"sharing\.layers is empty"),
        ({}, r"sharing\.layers is empty: .*\{q: \[\[0, 1\]"),
        ({"q": [[0, 5]]}, r"sharing\.layers\.q names layer 5, but q is in layers 0-4"),
        ({"q": [[0, 1], [1, 2]]}, r"layers\.q names layer 1 twice"),
        ({"q": [[0, 0]]}, r"layers\.q names layer 0 twice"),
        ({"gaet": [[0, 1]]}, r"gaet is no matrix type.*q, k, down"),
        ({"gate": [[0, 1]]}, r"gate is not in this model.*q, k, down"),
        ({"q": [0, 1]}, r"lists of layers by matrix type.*got \{q: \[0, 1\]\}"),
        ({"q": [[]]}, r"lists of layers by matrix type"),
        ({"q": [["0"]]}, r"whole numbers from 0, got '0'"),
        ("q", r"lists of layers by matrix type.*got 'q'"),
    ],
)
def test_bad_lists_are_refused(layers: dict[str, list[list[int]]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExplicitSharing(layers=layers).check(architecture(5))


def test_matrices_of_different_shapes_are_not_listed_together() -> None:
    narrow, wide = architecture(2, q=(8, 8)), architecture(4, q=(8, 16))
    mixed = Architecture("test", (*narrow.matrices, *(m for m in wide.matrices if m.layer >= 2)))
    with pytest.raises(ConfigError, match=r"layers \[1, 2\] together.*1: \(8, 8\), 2: \(8, 16\)"):
        ExplicitSharing(layers={"q": [[1, 2]]}).check(mixed)


def test_an_encoder_and_its_decoder_are_never_put_together() -> None:
    encoder, both = architecture(3, q=(8, 8)), architecture(6, q=(8, 8))
    decoder = (replace(m, stack=1) for m in both.matrices if m.layer >= 3)
    model = Architecture("test", (*encoder.matrices, *decoder))
    groups = AdjacentSharing(matrices=("q",), group_size=2).groups(problem(model))
    assert [g.layers for g in groups] == [(0, 1), (2,), (3, 4), (5,)]
