"""Which results may be called better or worse than each other: those of models that kept as much."""

from __future__ import annotations

from collections.abc import Sequence

# Relative: ranks are whole numbers, so the share that is kept is never exactly the one that was asked for.
SAME_SIZE = 0.01
STATED = "bold is the best of those that kept the same, within 1 %"


def equal_sizes(kept: Sequence[float | None]) -> list[list[int]]:
    """Indices in groups whose shares lie within `SAME_SIZE` of the smallest in the group, by size.

    An unknown share (None) compares with nothing, and is in no group.
    """
    known = sorted((share, i) for i, share in enumerate(kept) if share is not None)
    groups: list[list[int]] = []
    smallest = 0.0
    for share, i in known:
        if not groups or share > smallest * (1 + SAME_SIZE):
            groups.append([])
            smallest = share
        groups[-1].append(i)
    return groups
