"""Factors without their redundancy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bs_exp.linalg.decomposition import pivoted_form
from bs_exp.types import PivotedFactors, SharedFactors, WeightGroup


@dataclass(frozen=True, kw_only=True)
class PivotedLayout:
    """k columns of the product itself as the basis, and coefficients for the other columns only; where the basis is
    shared, k rows of the product as the coefficients, and a basis for the other inputs only.

    `B C = (B C_J)(C_J^-1 C)` for k independent columns J of C, and the block J of `C_J^-1 C` is the identity, which
    need not be stored: the same product with k^2 fewer parameters. So for k independent rows of B, which spares every
    layer of a group k^2 multiply-adds. One bit per output, or input, says whether it belongs to J, for each layer;
    these bits are counted as parameters of 16 bits. Pivoting Factorization (2501.19090) for a single matrix.
    """

    name: ClassVar[str] = "pivoted"

    def parameters(self, group: WeightGroup, rank: int) -> int:
        bits = group.size * -(-(group.d_out if group.size == 1 else group.d_in) // 16)
        return rank * (group.d_in + group.columns - rank) + bits + group.correction_parameters

    def arrange(self, factors: SharedFactors) -> PivotedFactors:
        return pivoted_form(factors)
