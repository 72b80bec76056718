"""Models for the tests of updates: tiny, compressed on random tokens, with any update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
from bs_exp.update.recover import Recovery
from bs_exp.whitening.gram import GramWhitening
from bs_exp.workspace import Workspace

QUIET = Progress(quiet=True)
LAYOUTS: list[Layout] = [PlainLayout(), PivotedLayout()]

RECOVERY = Recovery(
    blockwise_steps=0,
    steps=8,
    generated_windows=0,
    prompt_length=4,
    generation_batch=5,
    piece_length=6,
    batch_size=4,
    accumulation=1,
    optimizer="soap",
    precondition_frequency=3,
    max_precond_dim=256,
    learning_rate=0.02,
    schedule="cosine",
    warmup=0.1,
    weight_decay=0.0,
    clip_norm=1.0,
    temperature=1.0,
    autocast="none",
    holdout=0.2,
    evaluate_every=2,
    patience=None,
    checkpoint_minutes=None,
    seed=0,
)


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
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@dataclass
class Interrupting(Progress):
    """Ctrl-C in front of a step of training, or of what has the `label`."""

    quiet: bool = True
    steps: int = 0
    label: str | None = None
    notes: list[str] = field(default_factory=list)

    def track(self, iterable: Any, *, label: str | Callable[[], str], total: int | None = None) -> Iterator[Any]:
        for done, item in enumerate(iterable):
            meant = callable(label) if self.label is None else label == self.label
            if meant and done == self.steps:
                raise KeyboardInterrupt
            yield item
