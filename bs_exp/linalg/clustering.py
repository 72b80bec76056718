"""Agglomerative clustering with exact bounds on the sizes of clusters, which libraries do not offer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

LINKAGES: Mapping[str, Callable[[NDArray[np.float64]], np.floating[Any]]] = {
    "average": np.mean,
    "complete": np.max,
    "single": np.min,
}


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Constraints on clusters: bounds of their sizes, and their number unless `count` is None.

    With `adjacent`, clusters are runs of neighbouring items.
    """

    min_size: int
    max_size: int
    count: int | None = None
    adjacent: bool = False

    def allow(self, sizes: Sequence[int]) -> bool:
        """Whether clusters of these sizes keep the bounds, or can be merged into some that do."""
        if self.adjacent:
            return self._line(tuple(sizes))
        return _packable(tuple(sorted(sizes, reverse=True)), self.min_size, self.max_size, self.count)

    def _line(self, sizes: tuple[int, ...]) -> bool:
        # counts[j]: the possible numbers of runs within bounds into which the first j clusters can be merged
        counts: list[set[int]] = [{0}]
        for stop in range(1, len(sizes) + 1):
            found: set[int] = set()
            total = 0
            for start in range(stop - 1, -1, -1):
                total += sizes[start]
                if total > self.max_size:
                    break
                if total >= self.min_size:
                    found |= {count + 1 for count in counts[start]}
            counts.append(found)
        return bool(counts[-1]) if self.count is None else self.count in counts[-1]


def agglomerate(
    distances: NDArray[np.float64], bounds: Bounds, *, linkage: str, threshold: float | None = None
) -> list[tuple[int, ...]]:
    """Clusters of the items 0 .. n-1, each sorted, ordered by their first items.

    Repeatedly merges the two nearest clusters whose merger leaves the bounds within reach. It stops at `bounds.count`
    clusters; without a count, where no two clusters are within `threshold` (mergers that the smallest size requires are
    made regardless), or where the bounds allow no further merger.
    Raises ValueError if no clusters satisfy the bounds.
    """
    clusters: list[tuple[int, ...]] = [(item,) for item in range(len(distances))]
    if not bounds.allow([1] * len(clusters)):
        raise ValueError(f"{len(clusters)} items have no clusters within {bounds}")
    between = LINKAGES[linkage]
    while bounds.count is None or len(clusters) > bounds.count:
        pairs = _pairs(len(clusters), adjacent=bounds.adjacent)
        near = sorted((float(between(distances[np.ix_(clusters[a], clusters[b])])), a, b) for a, b in pairs)
        merger = _first_allowed(near, clusters, bounds, threshold)
        if merger is None:
            break
        a, b = merger
        joined = tuple(sorted(clusters[a] + clusters[b]))
        clusters = sorted([joined, *(c for i, c in enumerate(clusters) if i not in (a, b))])
    return clusters


def _pairs(count: int, *, adjacent: bool) -> Iterator[tuple[int, int]]:
    for a in range(count):
        for b in range(a + 1, min(a + 2, count) if adjacent else count):
            yield a, b


def _first_allowed(
    near: Sequence[tuple[float, int, int]], clusters: Sequence[tuple[int, ...]], bounds: Bounds, threshold: float | None
) -> tuple[int, int] | None:
    sizes = [len(cluster) for cluster in clusters]
    for distance, a, b in near:
        is_near = bounds.count is not None or threshold is None or distance <= threshold
        if not is_near and min(sizes[a], sizes[b]) >= bounds.min_size:
            continue  # beyond the threshold, only mergers that the smallest size requires
        merged = [*sizes[:a], sizes[a] + sizes[b], *sizes[a + 1 : b], *sizes[b + 1 :]]
        if bounds.allow(merged):
            return a, b
    return None


@lru_cache(maxsize=1 << 16)
def _packable(sizes: tuple[int, ...], low: int, high: int, count: int | None) -> bool:
    """Whether items, by falling size, can be packed into bins with sums from `low` to `high`, `count` bins if given."""
    total = sum(sizes)
    fewest, most = -(-total // high), min(total // low, len(sizes))
    if (sizes and sizes[0] > high) or not (fewest <= most if count is None else fewest <= count <= most):
        return False
    if not sizes or (count is None and sizes[-1] >= low):
        return True
    left = None if count is None else count - 1
    return any(_packable(rest, low, high, left) for rest in _without_a_bin(sizes, low, high))


def _without_a_bin(sizes: tuple[int, ...], low: int, high: int) -> Iterator[tuple[int, ...]]:
    """The sizes that remain after one bin with the largest item is filled, for every way to fill it."""
    first, rest = sizes[0], Counter(sizes[1:])
    kinds = sorted(rest, reverse=True)

    def fill(position: int, held: int) -> Iterator[tuple[int, ...]]:
        if position == len(kinds):
            if held >= low:
                yield tuple(size for size in kinds for _ in range(rest[size]))
            return
        size, available = kinds[position], rest[kinds[position]]
        for used in range(min(available, (high - held) // size), -1, -1):
            rest[size] = available - used
            yield from fill(position + 1, held + used * size)
        rest[size] = available

    yield from fill(0, first)
