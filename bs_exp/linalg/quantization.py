"""Whole numbers of few bits in place of a matrix: grids of values, and rounding to them.

A matrix is `[rows, columns]`, as a layer stores it: `y = x @ W^T`. Each row, in groups of columns, has a grid of
`2^bits` values `(code - zero) * scale`. Rounding measures its error in the outputs, `tr((W - Q) H (W - Q)^T)` with the
Gram `H = X^T X` of the inputs: rows do not depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bs_exp.errors import DecompositionError

# Grids narrower than the range of their weights that are tried, as shares of it: what is cut off costs less, at few
# bits, than what the others gain.
SHRINKS = tuple(1.0 - step / 50 for step in range(0, 26))
# Columns that are rounded before their errors reach the columns far behind them, by one product.
_BLOCK = 128


@dataclass(frozen=True, eq=False)
class Grid:
    """The values that the numbers of a matrix can take, by row and group of columns.

    Code q of row i and group g stands for `(q - zero[i, g]) * scale[i, g]`, rounded to `dtype`, that of the scale.
    Groups hold `group_size` columns, the last one perhaps fewer; None: a row is one group. A grid is symmetric if
    `zero` is None, which stands for `2^(bits - 1)` everywhere.
    """

    bits: int
    columns: int
    group_size: int | None
    scale: Float[Tensor, "rows groups"]
    zero: UInt8[Tensor, "rows groups"] | None

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    @cached_property
    def group_of_column(self) -> Tensor:
        """Index of the group of every column."""
        return torch.arange(self.columns, device=self.scale.device) // (self.group_size or max(self.columns, 1))

    @cached_property
    def _by_column(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every entry, `[rows, columns]`, in fp64."""
        zero = torch.full_like(self.scale, 2.0 ** (self.bits - 1)) if self.zero is None else self.zero
        return self.scale.double()[:, self.group_of_column], zero.double()[:, self.group_of_column]

    def codes(self, weight: Float[Tensor, "rows columns"]) -> UInt8[Tensor, "rows columns"]:
        """The codes of the nearest values."""
        scale, zero = self._by_column
        return self._nearest(weight, scale, zero)

    def column_codes(self, column: Float[Tensor, " rows"], index: int) -> UInt8[Tensor, " rows"]:
        """The codes of the nearest values, of one column."""
        scale, zero = self._by_column
        return self._nearest(column, scale[:, index], zero[:, index])

    def values(self, codes: UInt8[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """What codes stand for, in fp64, to the bit of what a model in `dtype` computes with."""
        scale, zero = self._by_column
        return self._value(codes, scale, zero)

    def column_values(self, codes: UInt8[Tensor, " rows"], index: int) -> Float[Tensor, " rows"]:
        """What the codes of one column stand for."""
        scale, zero = self._by_column
        return self._value(codes, scale[:, index], zero[:, index])

    def _nearest(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (weight.double() / scale + zero).round().clamp(0, 2**self.bits - 1).to(torch.uint8)

    def _value(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        # Differences of codes are exact in every dtype, and the product is rounded once: as in the model.
        return ((codes.double() - zero) * scale).to(self.dtype).double()


def fit_grid(
    weight: Float[Tensor, "rows columns"],
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    dtype: torch.dtype,
    importance: Float[Tensor, " columns"] | None = None,
    shrinks: Sequence[float] = SHRINKS,
) -> Grid:
    """The grid of least rounding error among those that span a share of each group's range of weights.

    Errors are squared, and weighted by `importance`, such as the diagonal of the inputs' Gram. The full range is that
    of round-to-nearest: symmetric `scale = max|w| / (2^(bits - 1) - 1)`; otherwise `scale = (max w - min w) / (2^bits -
    1)` and `zero = round(-min w / scale)`, where 0 counts as a weight, so that it has a code. A grid that is no better
    than a wider one is not taken. Raises DecompositionError for weights that are not finite.
    """
    if not bool(weight.isfinite().all()):
        raise DecompositionError("NaN or infinite values in weights that are to be quantised.")
    weight = weight.double()
    rows, columns = weight.shape
    size = group_size or max(columns, 1)
    groups = -(-columns // size)
    padded = torch.nn.functional.pad(weight, (0, groups * size - columns)).view(rows, groups, size)
    counts = (
        torch.ones(columns, dtype=torch.float64, device=weight.device) if importance is None else importance.double()
    )
    counts = torch.nn.functional.pad(counts, (0, groups * size - columns)).view(groups, size)
    # Channels that no input reached cost nothing either way: let them count a little.
    counts = counts + 1e-6 * counts.mean().clamp_min(torch.finfo(torch.float64).tiny)
    best: tuple[Tensor, Tensor] | None = None
    least = torch.full((rows, groups), math.inf, dtype=torch.float64, device=weight.device)
    for shrink in shrinks:
        scale, zero = _spanning(padded * shrink, bits, symmetric=symmetric, dtype=dtype)
        codes = (padded / scale[..., None] + zero[..., None]).round_().clamp_(0, 2**bits - 1)
        error = ((codes.sub_(zero[..., None]).mul_(scale[..., None]) - padded).square_() * counts).sum(dim=-1)
        if best is None:
            best, least = (scale, zero), error
            continue
        better = error < least
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        least = torch.where(better, error, least)
    assert best is not None
    zeros = None if symmetric else best[1].to(torch.uint8)
    return Grid(bits=bits, columns=columns, group_size=group_size, scale=best[0].to(dtype), zero=zeros)


def _spanning(
    weight: Float[Tensor, "rows groups size"], bits: int, *, symmetric: bool, dtype: torch.dtype
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """Scales, rounded to `dtype`, and zero points, whole numbers, both in fp64."""
    if symmetric:
        scale = weight.abs().amax(dim=-1) / (2 ** (bits - 1) - 1)
    else:
        low, high = weight.amin(dim=-1).clamp_max(0.0), weight.amax(dim=-1).clamp_min(0.0)
        scale = (high - low) / (2**bits - 1)
    # A group of zeros has any scale; one that is lost in the dtype is the least that it holds.
    scale = torch.where(scale > 0.0, scale.clamp_min(torch.finfo(dtype).tiny), 1.0).to(dtype).double()
    if symmetric:
        return scale, torch.full_like(scale, 2.0 ** (bits - 1))
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def round_with_feedback(
    weight: Float[Tensor, "rows columns"],
    grid: Grid,
    gram: Float[Tensor, "columns columns"],
    *,
    damping: float,
    by_importance: bool,
) -> UInt8[Tensor, "rows columns"]:
    """Codes of a grid by which the outputs change little: GPTQ (2210.17323, section 3.3 and Algorithm 1).

    Columns are rounded one after the other; what a rounding changes in the outputs, the columns that are still to be
    rounded make up for as well as they can. With `H^-1 = U^T U`, U upper triangular, the error e of column i moves
    column j by `-e U_ij / U_ii`. `damping`, as a share of the mean of the Gram's diagonal, is added to it.
    `by_importance` takes the columns of the largest inputs first (the code's `act_order`). Without inputs (a Gram of
    zeros) this is round-to-nearest.
    Raises DecompositionError if the Gram is not finite.
    """
    if not bool(gram.isfinite().all()):
        raise DecompositionError("the Gram of the inputs of weights that are to be quantised is not finite.")
    gram = gram.double()
    mean = float(gram.diagonal().mean()) if gram.numel() else 0.0
    if mean <= 0.0:
        return grid.codes(weight)
    order = torch.arange(grid.columns, device=weight.device)
    if by_importance:
        order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    places = order.tolist()
    damped = gram[order][:, order]
    upper = _inverse_root(damped, damping * mean)
    left = weight.double()[:, order].clone()
    codes = torch.empty(left.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, grid.columns, _BLOCK):
        end = min(start + _BLOCK, grid.columns)
        errors = torch.empty(left.shape[0], end - start, dtype=torch.float64, device=weight.device)
        for i in range(start, end):
            place = places[i]
            column = left[:, i]
            codes[:, place] = grid.column_codes(column, place)
            error = (column - grid.column_values(codes[:, place], place)) / upper[i, i]
            left[:, i + 1 : end] -= torch.outer(error, upper[i, i + 1 : end])
            errors[:, i - start] = error
        left[:, end:] -= errors @ upper[start:end, end:]
    return codes


def _inverse_root(gram: Float[Tensor, "d d"], ridge: float) -> Float[Tensor, "d d"]:
    """U upper triangular with `U^T U` the inverse of the Gram plus a ridge, which grows until the Gram has a root."""
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # Rounding moves eigenvalues by about d * eps * norm.
    ridge = max(ridge, len(gram) * torch.finfo(gram.dtype).eps * float(torch.linalg.matrix_norm(gram)))
    while True:
        lower, info = torch.linalg.cholesky_ex(gram + ridge * identity)
        if int(info) == 0:
            inverse = torch.cholesky_inverse(lower)
            root: Tensor
            root, info = torch.linalg.cholesky_ex((inverse + inverse.mT) / 2.0, upper=True)
            if int(info) == 0:
                return root
        ridge *= 10.0


def output_loss(
    weight: Float[Tensor, "rows columns"], values: Float[Tensor, "rows columns"], gram: Float[Tensor, "columns columns"]
) -> float:
    """`tr((W - Q) H (W - Q)^T)`: the squared change of the outputs on the inputs of the Gram H, at least 0."""
    error = weight.double() - values.double()
    return max(float((error * (error @ gram.double())).sum()), 0.0)
