"""Results are compared among models of one size."""

from __future__ import annotations

import pytest

from bs_exp.records.comparison import equal_sizes


@pytest.mark.parametrize(
    ("kept", "groups"),
    [
        ([], []),
        ([None, None], []),
        ([0.8, 0.8, None], [[0, 1]]),
        ([0.808, 0.8, 0.7], [[2], [1, 0]]),
        # Not a chain: the last is further from the first than 1 %.
        ([0.8, 0.807, 0.814], [[0, 1], [2]]),
        # Relative: a hundredth of a small model is little.
        ([0.1, 0.105], [[0], [1]]),
    ],
)
def test_groups_of_equals(kept: list[float | None], groups: list[list[int]]) -> None:
    assert equal_sizes(kept) == groups
