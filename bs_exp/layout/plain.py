"""Both factors stored as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bs_exp.types import SharedFactors, WeightGroup


@dataclass(frozen=True, kw_only=True)
class PlainLayout:
    """A basis `d_in x k` and coefficients `k x N`: `k (d_in + N)` parameters (Basis Sharing, section 3.3)."""

    name: ClassVar[str] = "plain"

    def parameters(self, group: WeightGroup, rank: int) -> int:
        return rank * (group.d_in + group.columns) + group.correction_parameters

    def arrange(self, factors: SharedFactors) -> SharedFactors:
        return factors
