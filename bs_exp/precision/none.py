"""The matrices stay in the model's dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedModel

from bs_exp.types import CalibrationData, LoadedModel, RankPlan
from bs_exp.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class ModelPrecision:
    """Nothing is quantised."""

    reads_windows: ClassVar[bool] = False

    def check(self, dense: LoadedModel, data: CalibrationData) -> None:
        pass

    def apply(
        self,
        compressed: PreTrainedModel,
        dense: LoadedModel,
        plan: RankPlan,
        data: CalibrationData,
        workspace: Workspace,
    ) -> Mapping[str, Any]:
        return {}
