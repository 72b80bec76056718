"""New windows from pieces of given ones, so that a long training on little text does not memorise it."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

# Places of tokens are int64 numbers; this leaves room for all sums, and no text is as long.
MAX_PIECE_LENGTH = 2**31 - 1
_WINDOWS_AT_ONCE = 1024


def resample(
    windows: Int[Tensor, "windows length"], count: int, *, piece_length: int, seed: int
) -> Int[Tensor, "count length"]:
    """`count` windows made of pieces of `piece_length` tokens, each from a random place of a random window.

    The first piece may be shorter, so that pieces begin at any position of the new window. A piece that reaches the end
    of its window continues at the beginning of the same window. The first token of a new window is the first token of a
    given one, since tokenizers may put a special token there. `piece_length` is at most `MAX_PIECE_LENGTH`.

    For distillation, such text is as good as any other: the target is what the dense model predicts for it.
    """
    generator = torch.Generator().manual_seed(seed)
    made = windows.new_empty(count, windows.shape[1])
    # In parts: the places of all tokens of all windows would take several times the memory of the windows.
    for part in made.split(_WINDOWS_AT_ONCE):
        part.copy_(_resampled(windows, len(part), piece_length, generator))
    return made


def _resampled(
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
