"""More windows out of the same text, so that a long training on little of it does not learn it by heart."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

AT_ONCE = 1024


def cut_anew(
    windows: Int[Tensor, "windows length"], count: int, *, piece_length: int, seed: int
) -> Int[Tensor, "count length"]:
    """`count` windows of pieces of `piece_length` tokens from random places of random windows.

    The first piece may be shorter, so that pieces begin anywhere. One that reaches the end of its window goes on at the
    beginning. The first token is that of a window, as there may be a special one. Where the targets are a model's own
    predictions, as in distillation, any text has true ones, and cut text has new ones for old tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    made = windows.new_empty(count, windows.shape[1])
    # Some at a time: the places of all tokens of all windows would take several times the memory of the windows.
    for part in made.split(AT_ONCE):
        part.copy_(_cut(windows, len(part), piece_length, generator))
    return made


def _cut(
    windows: Int[Tensor, "windows length"], count: int, piece_length: int, generator: torch.Generator
) -> Int[Tensor, "count length"]:
    number, length = windows.shape
    pieces = -(-(length - 1) // piece_length) + 1
    phases = torch.randint(piece_length, (count, 1), generator=generator)
    rows = torch.randint(number, (count, pieces), generator=generator)
    shifts = torch.randint(length, (count, pieces), generator=generator)
    positions = torch.arange(length)
    piece = (phases + positions) // piece_length
    made = windows[rows.gather(1, piece), (shifts.gather(1, piece) + positions) % length]
    made[:, 0] = windows[rows[:, 0], 0]
    return made
