"""Positions of items drawn from a sequence: evenly spaced ones, and a random held-out part."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def evenly_spaced(count: int, wanted: int | None) -> Int[Tensor, " chosen"]:
    """Positions (int64, ascending) of `wanted` of `count` items at even distances, the first and the last included.

    `wanted = 1` gives the first item; None, or at least `count`, gives all.
    """
    if wanted is None or wanted >= count:
        return torch.arange(count)
    return torch.linspace(0, count - 1, wanted).round().long()


def hold_out(count: int, share: float, seed: int) -> tuple[Int[Tensor, " kept"], Int[Tensor, " held_out"]]:
    """A random split of the positions 0 .. count-1: those that are kept and those held out, int64, each ascending.

    `round(share * count)` positions are held out, but at least 1 and at most `count - 1`. The same count, share and
    seed give the same split. Raises ValueError if there are fewer than 2 items, which cannot be split.
    """
    if count < 2:
        raise ValueError(f"a held-out split needs at least 2 items, got {count}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = min(max(1, round(share * count)), count - 1)
    return order[held:].sort().values, order[:held].sort().values
