"""Models for the suites: tiny, compressed on random tokens, with any update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bs_exp.allocation.uniform import UniformAllocation
from bs_exp.cache import Cache
from bs_exp.importance.none import NoImportance
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.pipeline import Recipe, compress
from bs_exp.progress import Progress
from bs_exp.protocols import Layout
from bs_exp.schedule.single import SingleRound
from bs_exp.sharing.adjacent import AdjacentSharing
from bs_exp.types import CalibrationData, CompressedModel, LoadedModel, TokenWindows
from bs_exp.whitening.gram import GramWhitening
from bs_exp.workspace import Workspace

QUIET = Progress(quiet=True)
LAYOUTS: list[Layout] = [PlainLayout(), PivotedLayout()]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Calibration on random tokens."""

    count: int = 16
    batch_size: int = 8

    def windows(self, tokenizer: object) -> TokenWindows:
        ids = torch.randint(0, 256, (self.count, 24), generator=torch.Generator().manual_seed(1))
        return TokenWindows(ids=ids, provenance={"sha256": f"tokens-{self.count}"})

    def data(self) -> CalibrationData:
        return CalibrationData(self.windows(None), self.batch_size)


def recipe(update: Any, layout: Layout = LAYOUTS[0]) -> Recipe:
    """Half the parameters: pairs of layers share what they read, by the Gram, at uniform ranks."""
    return Recipe(
        calibration=Tokens(),
        sharing=AdjacentSharing(matrices=("q", "k", "v", "qkv", "up", "gate"), group_size=2),
        whitening=GramWhitening(ridge=1e-6),
        importance=NoImportance(),
        allocation=UniformAllocation(),
        layout=layout,
        schedule=SingleRound(),
        update=update,
        retain_ratio=0.5,
    )


def updated(dense: LoadedModel, update: Any, cache: Cache | None = None, **options: Any) -> CompressedModel:
    """The model at half its parameters, with the update."""
    return compress(dense, recipe(update, **options), Workspace(cache or Cache(None), QUIET))


def values(module: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of all that a model stores, by name."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two models store the same bits under the same names."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
