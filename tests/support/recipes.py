"""A recipe on random tokens, from which tests replace a strategy or two."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bs_exp.allocation.uniform import UniformAllocation
from bs_exp.importance.none import NoImportance
from bs_exp.layout.plain import PlainLayout
from bs_exp.pipeline import Recipe
from bs_exp.schedule.single import SingleRound
from bs_exp.sharing.adjacent import AdjacentSharing
from bs_exp.types import CalibrationData, TokenWindows
from bs_exp.update.none import NoUpdate
from bs_exp.whitening.gram import GramWhitening


@dataclass(frozen=True, kw_only=True)
class RandomTokens:
    """Calibration on random tokens."""

    seed: int = 0
    count: int = 24
    batch_size: int = 8

    def windows(self, tokenizer: object) -> TokenWindows:
        ids = torch.randint(0, 256, (self.count, 32), generator=torch.Generator().manual_seed(self.seed))
        return TokenWindows(ids=ids, provenance={"sha256": f"random-{self.seed}-{self.count}"})

    def data(self) -> CalibrationData:
        return CalibrationData(self.windows(None), self.batch_size)


RECIPE = Recipe(
    calibration=RandomTokens(),
    sharing=AdjacentSharing(matrices=("q", "k", "v", "qkv", "up", "gate", "gate_up"), group_size=2),
    whitening=GramWhitening(ridge=1e-6),
    importance=NoImportance(),
    allocation=UniformAllocation(),
    layout=PlainLayout(),
    schedule=SingleRound(),
    update=NoUpdate(),
    retain_ratio=0.6,
)
