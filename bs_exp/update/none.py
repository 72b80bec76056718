"""The factors stay as truncation made them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from bs_exp.cache import Cache
from bs_exp.progress import Progress
from bs_exp.protocols import Calibration
from bs_exp.types import LoadedModel, RankPlan


@dataclass(frozen=True, kw_only=True)
class NoUpdate:
    """Nothing is updated."""

    def check(self, dense: LoadedModel, calibration: Calibration) -> None:
        pass

    def apply(
        self,
        compressed: PreTrainedModel,
        dense: LoadedModel,
        plan: RankPlan,
        calibration: Calibration,
        cache: Cache,
        progress: Progress,
    ) -> Mapping[str, Any]:
        return {}
