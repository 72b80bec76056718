"""The factors stay as truncation made them."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from bs_exp.protocols import Calibration
from bs_exp.types import LoadedModel


@dataclass(frozen=True, kw_only=True)
class NoUpdate:
    """Nothing is updated."""

    def apply(self, compressed: PreTrainedModel, dense: LoadedModel, calibration: Calibration) -> None:
        return None
