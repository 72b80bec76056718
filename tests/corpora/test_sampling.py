"""Positions drawn from a sequence: evenly spaced ones, and a held-out part of a seed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bs_exp.corpora.sampling import evenly_spaced, hold_out


@given(count=st.integers(1, 3000), wanted=st.integers(1, 3000))
def test_evenly_spaced_positions_reach_from_the_first_to_the_last_at_distances_that_differ_by_one_at_most(
    count: int, wanted: int
) -> None:
    positions = evenly_spaced(count, wanted).tolist()
    assert len(positions) == min(count, wanted) and positions[0] == 0
    assert positions[-1] == count - 1 or wanted == 1
    distances = {b - a for a, b in pairwise(positions)}
    assert min(distances, default=1) >= 1 and max(distances, default=1) - min(distances, default=1) <= 1


def test_all_positions_where_nothing_is_left_out() -> None:
    for wanted in (None, 7, 8):
        assert evenly_spaced(7, wanted).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert evenly_spaced(9, 3).tolist() == [0, 4, 8]
    assert evenly_spaced(9, 1).tolist() == [0]


@given(count=st.integers(2, 400), share=st.floats(0.0, 1.0), seed=st.integers(0, 2**32))
def test_a_split_has_every_position_in_one_part_and_both_parts_have_some(count: int, share: float, seed: int) -> None:
    kept, held = hold_out(count, share, seed)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(count))
    assert kept.tolist() == sorted(kept.tolist()) and held.tolist() == sorted(held.tolist())
    assert len(held) == min(max(1, round(share * count)), count - 1)
    again = hold_out(count, share, seed)
    assert torch.equal(again[0], kept) and torch.equal(again[1], held)


def test_the_split_of_a_seed_stays_what_it_was() -> None:
    # Pinned: checkpoints of trainings and results of selections depend on it.
    kept, held = hold_out(10, 0.3, seed=3)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3)).tolist()
    assert held.tolist() == sorted(order[:3]) and kept.tolist() == sorted(order[3:])
    assert hold_out(10, 0.3, seed=4)[1].tolist() != held.tolist()


@pytest.mark.parametrize("count", [0, 1])
def test_one_item_cannot_be_split(count: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 items, got {count}"):
        hold_out(count, 0.5, seed=0)
