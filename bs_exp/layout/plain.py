"""Both factors stored as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from bs_exp.protocols import StoredFactors
from bs_exp.types import SharedFactors, WeightGroup


@dataclass(frozen=True, kw_only=True)
class PlainLayout:
    """A basis `d_in x k` and coefficients `k x N`: `k (d_in + N)` parameters (Basis Sharing, section 3.3)."""

    name: ClassVar[str] = "plain"

    def parameters(self, group: WeightGroup, rank: int) -> int:
        return rank * (group.d_in + group.columns) + group.correction_parameters

    def arrange(self, factors: SharedFactors) -> StoredFactors:
        return StoredFactors(self, factors.group, factors.basis, factors.coefficients, corrections=factors.corrections)

    def restore(self, stored: StoredFactors) -> SharedFactors:
        return SharedFactors(stored.group, stored.basis, stored.coefficients, stored.corrections).double()

    def with_coefficients(self, stored: StoredFactors, coefficients: Mapping[int, Tensor]) -> StoredFactors:
        return replace(stored, coefficients={**stored.coefficients, **coefficients})
