"""No whitening: plain SVD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bs_exp.types import GroupStatistics, Metric, Statistic


@dataclass(frozen=True, kw_only=True)
class IdentityWhitening:
    """Error in the weights themselves, `||W - W_k||_F`: truncated SVD, no calibration (Eckart and Young, 1936)."""

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def metric(self, statistics: GroupStatistics) -> Metric:
        return Metric(whitener=None)
