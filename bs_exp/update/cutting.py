"""More windows out of the same text, so that a long training on little of it does not learn it by heart."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def cut_anew(
    windows: Int[Tensor, "windows length"], count: int, *, piece_length: int, seed: int
) -> Int[Tensor, "count length"]:
    """`count` windows of pieces of `piece_length` tokens from random places of random windows.

    The first piece may be shorter, so that pieces begin anywhere. One that reaches the end of its window goes on at the
    beginning. The first token is that of a window, as there may be a special one. Where the targets are a model's own
    predictions, as in distillation, any text has true ones, and cut text has new ones for old tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    number, length = windows.shape
    done = torch.randint(piece_length, (count, 1), generator=generator)
    piece = (done + torch.arange(length)) // piece_length
    rows = torch.randint(number, (count, length), generator=generator).gather(1, piece)
    shifts = torch.randint(length, (count, length), generator=generator).gather(1, piece)
    made = windows[rows, (torch.arange(length) + shifts) % length]
    made[:, 0] = windows[rows[:, 0], 0]
    return made
