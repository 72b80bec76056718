"""All channels count as the calibration inputs make them count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from bs_exp.types import Statistic


@dataclass(frozen=True, kw_only=True)
class NoImportance:
    """The Gram as it is."""

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def reweight(self, gram: Float[Tensor, "d_in d_in"]) -> Float[Tensor, "d_in d_in"]:
        return gram
