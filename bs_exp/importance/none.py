"""No re-weighting of channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bs_exp.types import GroupStatistics, Statistic


@dataclass(frozen=True, kw_only=True)
class NoImportance:
    """Leaves the statistics of every group unchanged."""

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def reweight(self, statistics: GroupStatistics) -> GroupStatistics:
        return statistics
