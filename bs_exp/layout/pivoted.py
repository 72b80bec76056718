"""Factors without their k^2 redundant numbers, by pivoting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bs_exp.linalg.decomposition import pivoted_form
from bs_exp.types import PivotedFactors, SharedFactors, WeightGroup


@dataclass(frozen=True, kw_only=True)
class PivotedLayout:
    """The product of plain factors with k^2 fewer parameters: a k x k identity in one of the factors is not stored.

    `B C = (B C_J)(C_J^-1 C)` for k independent columns J of C, where the block J of `C_J^-1 C` is the identity. So the
    basis of a single matrix is k columns of the product, and it stores coefficients for the other columns only. A
    shared basis uses k independent rows of B in the same way: the coefficients are k rows of the product, and the basis
    is stored for the other inputs only, which saves every layer of a group k^2 multiply-adds. One bit per output (or
    input) and layer tells whether it belongs to J; 16 bits count as one parameter.
    Pivoting Factorization (2501.19090) for a single matrix.
    """

    name: ClassVar[str] = "pivoted"

    def parameters(self, group: WeightGroup, rank: int) -> int:
        bits = group.size * -(-(group.d_out if group.size == 1 else group.d_in) // 16)
        return rank * (group.d_in + group.columns - rank) + bits + group.correction_parameters

    def arrange(self, factors: SharedFactors) -> PivotedFactors:
        return pivoted_form(factors)
