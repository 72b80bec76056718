"""Clusters keep their bounds exactly, are SciPy's where bounds do not bind, and adjacent groups where they must be."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from bs_exp.errors import ConfigError
from bs_exp.linalg.clustering import Bounds, agglomerate
from bs_exp.linalg.subspaces import left_subspace, subspace_distances
from bs_exp.sharing.adjacent import AdjacentSharing
from bs_exp.sharing.clustered import ClusteredSharing
from bs_exp.testing.measures import GivenMeasures, architecture, problem, random_measures


def clustered(**settings: Any) -> ClusteredSharing:
    defaults: dict[str, Any] = {
        "matrices": ("q", "k"),
        "space": "weight",
        "subspace": 2,
        "linkage": "average",
        "clusters": None,
        "max_distance": None,
        "min_size": 1,
        "max_size": None,
        "adjacent_only": False,
    }
    return ClusteredSharing(**{**defaults, **settings})


def distances(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    points = np.random.default_rng(seed).normal(size=(count, 3))
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def compositions(total: int) -> list[tuple[int, ...]]:
    if total == 0:
        return [()]
    return [(first, *rest) for first in range(1, total + 1) for rest in compositions(total - first)]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("space", ["weight", "whitened"])
def test_forced_adjacency_of_one_size_is_adjacent(size: int, space: str) -> None:
    model = architecture(6)
    forced = clustered(space=space, min_size=size, max_size=size, adjacent_only=True)
    adjacent = AdjacentSharing(matrices=("q", "k"), group_size=size)
    case = problem(model, random_measures(model))
    assert forced.groups(case) == adjacent.groups(case)


def test_layers_that_read_the_same_directions_are_found_wherever_they_stand() -> None:
    """In `random_measures` the even layers have one column space in common, and the odd ones another."""
    model = architecture(6, q=(8, 8), down=(20, 8))
    groups = clustered(matrices=("q",), clusters=2).groups(problem(model, random_measures(model)))
    assert [g.layers for g in groups if g.matrix == "q"] == [(0, 2, 4), (1, 3, 5)]
    assert all(g.size == 1 for g in groups if g.matrix == "down")
    threshold = clustered(matrices=("q",), max_distance=0.5).groups(problem(model, random_measures(model)))
    assert threshold == groups
    assert all(g.size == 1 for g in clustered(max_distance=0.0).groups(problem(model, random_measures(model))))


def test_whitened_clusters_hear_the_metric() -> None:
    """Two layers differ in directions that no input ever takes: equal in the metric, not in weight space."""
    generator = torch.Generator().manual_seed(0)
    model = architecture(3, q=(6, 6))
    seen = torch.zeros(6, 6, dtype=torch.float64)
    seen[:3] = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    unseen = torch.zeros(6, 6, dtype=torch.float64)
    unseen[3:] = 100 * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    weights = {("q", 0): seen, ("q", 1): unseen + 0.1 * seen.flip(1).flip(0), ("q", 2): unseen + seen}
    gram = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1e-12, 1e-12, 1e-12], dtype=torch.float64))
    case = problem(model, GivenMeasures(weights, dict.fromkeys(weights, gram)))
    pair = {
        space: [g.layers for g in clustered(matrices=("q",), space=space, clusters=2).groups(case)]
        for space in ("weight", "whitened")
    }
    assert pair == {"weight": [(0,), (1, 2)], "whitened": [(0, 2), (1,)]}


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])
def test_distance_is_that_of_the_projectors(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    found = subspace_distances([left_subspace(matrix, 4) for matrix in matrices])
    projectors = []
    for matrix in matrices:
        left = torch.linalg.svd(matrix).U[:, :4]
        projectors.append(left @ left.mT)
    for a, b in itertools.product(range(3), repeat=2):
        expected = float((projectors[a] - projectors[b]).norm()) / 8**0.5
        assert float(found[a, b]) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("method", ["average", "complete", "single"])
@pytest.mark.parametrize("seed", range(5))
def test_without_bounds_clusters_are_those_of_scipy(method: str, seed: int) -> None:
    matrix = distances(12, seed)
    tree = linkage(squareform(matrix), method)
    for count in range(1, 13):
        labels = fcluster(tree, count, "maxclust")
        expected = sorted(tuple(np.flatnonzero(labels == label)) for label in set(labels))
        bounds = Bounds(min_size=1, max_size=12, count=count)
        assert agglomerate(matrix, bounds, linkage=method) == expected
    threshold = float(np.median(matrix))
    labels = fcluster(tree, threshold, "distance")
    expected = sorted(tuple(np.flatnonzero(labels == label)) for label in set(labels))
    free = Bounds(min_size=1, max_size=12)
    assert agglomerate(matrix, free, linkage=method, threshold=threshold) == expected


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 14),
    low=st.integers(1, 5),
    room=st.integers(0, 4),
    number=st.none() | st.integers(1, 8),
    threshold=st.none() | st.floats(0.0, 4.0),
    adjacent=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_bounds_are_kept_exactly_or_refused(
    count: int, low: int, room: int, number: int | None, threshold: float | None, adjacent: bool, seed: int
) -> None:
    """Oracle: some number of groups n has sizes within the bounds just if n * low <= count <= n * high."""
    high = low + room
    bounds = Bounds(min_size=low, max_size=high, count=number, adjacent=adjacent)
    numbers = range(1, count + 1) if number is None else [number]
    if not any(n * low <= count <= n * high for n in numbers):
        with pytest.raises(ValueError, match="no clusters"):
            agglomerate(distances(count, seed), bounds, linkage="average", threshold=threshold)
        return
    clusters = agglomerate(distances(count, seed), bounds, linkage="average", threshold=threshold)
    assert sorted(item for cluster in clusters for item in cluster) == list(range(count))
    assert all(low <= len(cluster) <= high for cluster in clusters)
    assert number is None or len(clusters) == number
    if adjacent:
        assert all(cluster == tuple(range(cluster[0], cluster[-1] + 1)) for cluster in clusters)


@pytest.mark.parametrize(("low", "high", "count"), [(1, 3, None), (2, 3, None), (3, 3, None), (2, 4, 3), (1, 5, 2)])
def test_reach_of_the_bounds_is_that_of_brute_force(low: int, high: int, count: int | None) -> None:
    """Oracle: all ways to put items of given sizes into bins, in a line or freely."""

    def fits(bins: list[int]) -> bool:
        return all(low <= size <= high for size in bins) and count in (None, len(bins))

    for sizes in compositions(8):
        marks = itertools.product((False, True), repeat=len(sizes) - 1)
        line = any(fits(_cut(sizes, mark)) for mark in marks)
        assert Bounds(min_size=low, max_size=high, count=count, adjacent=True).allow(sizes) == line
        if len(sizes) <= 6:
            free = (
                any(
                    fits([sum(s for s, b in zip(sizes, bins, strict=True) if b == used) for used in set(bins)])
                    for bins in itertools.product(range(len(sizes)), repeat=len(sizes))
                )
                if tuple(sorted(sizes)) == sizes
                else None
            )
            if free is not None:
                assert Bounds(min_size=low, max_size=high, count=count).allow(sizes) == free


def _cut(sizes: tuple[int, ...], marks: tuple[bool, ...]) -> list[int]:
    bins = [sizes[0]]
    for size, cut in zip(sizes[1:], marks, strict=True):
        if cut:
            bins.append(size)
        else:
            bins[-1] += size
    return bins


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"clusters": 6}, r"clusters must be at most 5, the layers of q \(8 x 8\).*got 6"),
        ({"min_size": 2, "max_size": 2}, r"5 layers of q cannot be put into groups of such sizes"),
        ({"min_size": 2, "clusters": 3}, r"5 layers of q cannot be put into 3 groups"),
        ({"min_size": 6}, r"min_size must be between 1 and 5 .*got 6"),
        ({"subspace": 8}, r"subspace must be below 8 for q \(8 x 8\), got 8"),
        ({"matrices": ("k",), "subspace": 5}, r"subspace must be below 5 for k \(8 x 4\), got 5"),
        ({"matrices": ("gate",)}, r"names no matrix type of this model"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_any_work(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        clustered(**wrong).check(architecture(5))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"space": "outer"}, "space must be one of weight, whitened, got 'outer'"),
        ({"linkage": "ward"}, "linkage must be one of average, complete, single, got 'ward'"),
        ({"subspace": 0}, "subspace must be a whole number of directions"),
        ({"subspace": 1.5}, "share of them between 0 and 1, got 1.5"),
        ({"subspace": True}, "got true"),
        ({"clusters": 0}, "clusters must be a whole number of at least 1"),
        ({"max_distance": 1.5}, "max_distance must be between 0 and 1"),
        ({"clusters": 2, "max_distance": 0.5}, "only one of them"),
        ({"min_size": 3, "max_size": 2}, r"max_size must be at least min_size \(3\), got 2"),
        ({"matrices": ()}, "matrices is empty"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        clustered(**wrong)
