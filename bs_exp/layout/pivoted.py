"""Factors without their k^2 redundant numbers, by pivoting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from bs_exp.linalg.pivoting import PivotedForm, pivoted_form, pivots_are_inputs, plain_form
from bs_exp.models.modeling_basis_sharing import pack_bits, unpack_bits
from bs_exp.protocols import StoredFactors
from bs_exp.types import SharedFactors, WeightGroup


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
        bits = group.size * -(-_features(group) // 16)
        return rank * (group.d_in + group.columns - rank) + bits + group.correction_parameters

    def arrange(self, factors: SharedFactors) -> StoredFactors:
        return self._stored(factors, pivoted_form(factors))

    def arrange_like(self, factors: SharedFactors, stored: StoredFactors) -> StoredFactors:
        return self._stored(factors, pivoted_form(factors, _pivots(stored)))

    def _stored(self, factors: SharedFactors, form: PivotedForm) -> StoredFactors:
        return StoredFactors(
            self,
            factors.group,
            form.basis,
            form.coefficients,
            {"pivots": pack_bits(form.pivots)},
            factors.corrections,
        )

    def restore(self, stored: StoredFactors) -> SharedFactors:
        plain = plain_form(stored.group, PivotedForm(stored.basis, stored.coefficients, _pivots(stored)))
        return replace(plain, corrections=stored.corrections).double()

    def with_coefficients(self, stored: StoredFactors, coefficients: Mapping[int, Tensor]) -> StoredFactors:
        if pivots_are_inputs(stored.group):
            return replace(stored, coefficients={**stored.coefficients, **coefficients})
        # The coefficients of a single matrix hold the identity, so other columns may become pivots.
        return self.arrange(replace(self.restore(stored), coefficients=coefficients))


def _pivots(stored: StoredFactors) -> Tensor:
    return unpack_bits(stored.kept["pivots"], _features(stored.group))


def _features(group: WeightGroup) -> int:
    """How many features there are to choose pivots from."""
    return group.d_in if pivots_are_inputs(group) else group.d_out
