"""Whitening by diagonal blocks of the Gram of the calibration inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.linalg.cholesky import cholesky_whitener
from bs_exp.types import GroupStatistics, Metric, Statistic
from bs_exp.validation import check_at_least, check_share


@dataclass(frozen=True, kw_only=True)
class BlockDiagonalWhitening:
    """Error in the outputs as if inputs of different blocks were uncorrelated: `S = diag(S_1 .. S_b)`.

    `S_i^T S_i` is the Gram of the i-th of `blocks` runs of neighbouring channels, whose sizes differ by one at most.
    One block is whitening by the Gram; as many blocks as channels, or more, make it diagonal. The predicted loss leaves
    out the cross terms between errors of different blocks. `ridge` is that of `GramWhitening`.
    Between SVD-LLM (2403.07378), section 3.1, and ASVD (2312.05821), section 3.2.
    """

    blocks: int
    ridge: float

    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.GRAM})

    def __post_init__(self) -> None:
        check_at_least(1, blocks=self.blocks)
        check_share(ridge=self.ridge)

    def metric(self, statistics: GroupStatistics) -> Metric:
        if statistics.gram is None:
            raise ValueError("BlockDiagonalWhitening needs a Gram; it says so in `needs`.")
        whitener, ridge = cholesky_whitener(block_diagonal(statistics.gram, self.blocks), ridge=self.ridge)
        return Metric(whitener=whitener, ridge=ridge)


def block_diagonal(gram: Float[Tensor, "d d"], blocks: int) -> Float[Tensor, "d d"]:
    """The Gram with zeros outside its diagonal blocks; its Cholesky factor has the same zeros."""
    channels = torch.arange(gram.shape[0], device=gram.device)
    runs = channels.tensor_split(min(blocks, len(channels)))
    diagonal: Tensor = torch.block_diag(*(gram[run][:, run] for run in runs))
    return diagonal
