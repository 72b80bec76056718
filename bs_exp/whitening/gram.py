"""Whitening by the Gram of the calibration inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bs_exp.linalg.cholesky import damped_root
from bs_exp.linalg.decomposition import needs_left_root
from bs_exp.types import GroupStatistics, LossUnit, Metric, Statistic
from bs_exp.validation import check_share


@dataclass(frozen=True, kw_only=True)
class GramWhitening:
    """Error in the outputs on the calibration inputs, `||X (W - W_k)||_F`.

    `ridge` is added to the Gram's diagonal, as a share of its entries; a Gram that is not positive definite gets
    as much more as it needs.
    SVD-LLM (2403.07378), section 3.1; Basis Sharing (2410.03765), section 3.1.
    """

    ridge: float

    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.GRAM})

    def __post_init__(self) -> None:
        check_share(ridge=self.ridge)

    def metric(self, statistics: GroupStatistics) -> Metric:
        if statistics.gram is None:
            raise ValueError("GramWhitening needs a Gram; it says so in `needs`.")
        group = statistics.group
        whitener, ridge = damped_root(statistics.gram, ridge=self.ridge, needed=needs_left_root(group))
        return Metric(whitener=whitener, ridge=ridge, unit=LossUnit.OUTPUT_NORM)
