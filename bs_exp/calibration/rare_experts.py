"""What experts are taken to have read that few calibration tokens were sent to: their own, and average ones.

An expert's matrix `[d_in, d_out]` wants `max(d_in, d_out)` tokens: with fewer, its Grams are singular. One that read
n < m = max(d_in, d_out) tokens gets `m - n` average tokens besides: `G = G_own + (m - n) P`, where P is the mean of
`x x^T` over all tokens that reached the experts of its layer, each counted for every expert that read it. One that read
m tokens or more has its own Gram alone.

The hidden channels of two experts have nothing to do with each other, whatever their numbers are. So of what is in
these channels P keeps the mean size alone, and is a multiple of the identity: that is the mean of P over all ways to
number the channels, less a constant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.errors import CalibrationError
from bs_exp.types import InputMoments, WeightMatrix

# The matrix whose inputs are hidden channels of its expert; those of the others are its outputs.
_READS_HIDDEN = "expert_down"


def wanted_tokens(matrix: WeightMatrix) -> int:
    """The number of tokens from which on the statistics of an expert's matrix are its own alone."""
    return max(matrix.d_in, matrix.d_out)


def lacking(matrix: WeightMatrix, tokens: int) -> int:
    """How many average tokens the statistics of a matrix need besides its own; 0 for what is no expert's."""
    return 0 if matrix.expert is None else max(0, wanted_tokens(matrix) - tokens)


def mean_gram(
    grams: Iterable[tuple[Float[Tensor, "d d"], int]], matrix: WeightMatrix, *, outputs: bool = False
) -> Float[Tensor, "d d"]:
    """P from the Grams of all experts of a layer with their numbers of tokens, in fp64.

    `outputs`: of gradients at the outputs of the matrix, in place of its inputs. CalibrationError if no token came.
    """
    total, count = None, 0
    for gram, tokens in grams:
        total, count = gram.double() if total is None else total + gram, count + tokens
    if total is None or not count:
        raise _nothing(matrix)
    mean: Tensor = total / count
    if (matrix.matrix == _READS_HIDDEN) is outputs:
        return mean
    return mean.diagonal().mean() * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)


def filled_moments(
    own: InputMoments, others: Sequence[tuple[InputMoments, int]], matrix: WeightMatrix, tokens: int
) -> InputMoments:
    """The moments of an expert's own tokens and of average ones, up to the number of tokens that it wants.

    The peak is the largest one of any expert, since among average tokens there may be that one.
    """
    if not (missing := lacking(matrix, tokens)):
        return own
    if not (count := sum(n for _, n in others)):
        raise _nothing(matrix)
    absolute, fourth = (
        sum((getattr(moments, name) * n for moments, n in others), torch.zeros_like(own.absolute)) / count
        for name in ("absolute", "fourth")
    )
    peak = torch.stack([moments.peak for moments, _ in others]).amax(0)
    if matrix.matrix == _READS_HIDDEN:
        absolute, peak, fourth = (value.mean().expand_as(value) for value in (absolute, peak, fourth))
    whole = tokens + missing
    return InputMoments(
        absolute=(tokens * own.absolute + missing * absolute) / whole,
        peak=torch.maximum(own.peak, peak),
        fourth=(tokens * own.fourth + missing * fourth) / whole,
    )


def mean_rows(others: Sequence[Tensor], matrix: WeightMatrix) -> Float[Tensor, " d_in"]:
    """The squared gradients of weights by row, averaged over the experts of a layer: for one that has none."""
    mean = torch.stack(list(others)).mean(0)
    return mean.mean().expand_as(mean).clone() if matrix.matrix == _READS_HIDDEN else mean


def told_of(tokens: Mapping[WeightMatrix, int]) -> list[str]:
    """Notes on experts that few tokens were sent to, by how many tokens each of their matrices read."""
    found = {(m.layer, m.expert): (m, count) for m, count in tokens.items()}
    notes = []
    if idle := [place for place, (_, count) in found.items() if not count]:
        named = "; ".join(
            f"layer {layer}: {', '.join(str(expert) for at, expert in idle if at == layer)}"
            for layer in dict.fromkeys(layer for layer, _ in idle)
        )
        notes.append(
            f"no calibration token was sent to {len(idle)} of {len(found)} experts ({named}). They are compressed as "
            "if average tokens of their layer had come; more calibration text (calibration.num_sequences) may reach "
            "them"
        )
    if few := [count for matrix, count in found.values() if count and lacking(matrix, count)]:
        notes.append(
            f"{len(few)} of {len(found)} experts read fewer calibration tokens than they have channels (the least: "
            f"{min(few)}); average tokens of their layer make up for the rest"
        )
    return notes


def _nothing(matrix: WeightMatrix) -> CalibrationError:
    return CalibrationError(
        f"no calibration token was sent to any expert of layer {matrix.layer} ({matrix.module}), so nothing is known "
        "of their inputs. Calibrate on other text, or leave experts dense: model.roles={experts: dense}."
    )
