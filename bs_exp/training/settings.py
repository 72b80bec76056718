"""Settings that every trained update has, and what follows from them: the split, the batches, the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from bs_exp.corpora.sampling import hold_out
from bs_exp.errors import ConfigError, DataError
from bs_exp.validation import check_at_least, check_choice, check_number, check_positive, check_seed, check_share

SCHEDULES = ("cosine", "linear", "constant")
AUTOCAST = ("none", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """Settings of a training. An update that trains inherits them, so each is a dial of its own: `update.steps`.

    A step of the optimiser takes `batch_size` windows, in `accumulation` forward and backward passes. `schedule` is how
    the learning rate falls after its linear growth over the share `warmup` of the steps. `clip_norm` bounds the norm of
    a step's gradient (None: no bound). `autocast` is the dtype in which training computes. The share `holdout` of the
    windows is measured, every `evaluate_every` steps, and not trained on; after `patience` measurements without gain,
    training stops (None: never). `checkpoint_minutes` lie between checkpoints (None: only the result is stored).
    """

    steps: int
    batch_size: int
    accumulation: int
    learning_rate: float
    schedule: str
    warmup: float
    weight_decay: float
    clip_norm: float | None
    autocast: str
    holdout: float
    evaluate_every: int
    patience: int | None
    checkpoint_minutes: float | None
    seed: int

    def __post_init__(self) -> None:
        check_at_least(0, steps=self.steps)
        check_seed(self.seed)
        check_at_least(1, batch_size=self.batch_size, accumulation=self.accumulation)
        check_at_least(1, evaluate_every=self.evaluate_every, patience=self.patience)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("autocast", self.autocast, AUTOCAST)
        check_share(warmup=self.warmup, holdout=self.holdout)
        check_positive(learning_rate=self.learning_rate, clip_norm=self.clip_norm)
        check_number(0.0, weight_decay=self.weight_decay, checkpoint_minutes=self.checkpoint_minutes)
        if self.accumulation > self.batch_size:
            raise ConfigError(
                f"accumulation must be at most batch_size, which is {self.batch_size}, as each pass takes at least one "
                f"window, got {self.accumulation}. Lower it, or raise batch_size."
            )


def split_windows(
    ids: Int[Tensor, "windows length"], settings: TrainerSettings
) -> tuple[Int[Tensor, "training length"], Int[Tensor, "held_out length"]]:
    """Windows to train on and windows held out, drawn by `seed`: at least one of each, or all and none at holdout 0.

    Raises DataError if there are fewer than 2 windows to split.
    """
    if settings.holdout == 0.0:
        return ids, ids[:0]
    if len(ids) < 2:
        raise DataError(
            f"Training needs at least 2 calibration windows, one of them held out, got {len(ids)}. Raise "
            "calibration.num_sequences, or set update=none."
        )
    kept, held_out = hold_out(len(ids), settings.holdout, settings.seed)
    return ids[kept], ids[held_out]


def draw_batches(windows: int, settings: TrainerSettings) -> Int[Tensor, "steps batch"]:
    """Positions (int64) of the windows of each step: every window once per epoch, in an order drawn by `seed`."""
    generator = torch.Generator().manual_seed(settings.seed)
    needed = settings.steps * settings.batch_size
    epochs = [torch.randperm(windows, generator=generator) for _ in range(max(1, -(-needed // windows)))]
    return torch.cat(epochs)[:needed].view(settings.steps, settings.batch_size)


def rate_factor(step: int, settings: TrainerSettings) -> float:
    """Share of the learning rate in a step (counted from 0): it grows linearly, then falls as `schedule` says."""
    warmup = round(settings.warmup * settings.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (settings.steps - warmup)
    match settings.schedule:
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        case "linear":
            return 1.0 - done
        case _:
            return 1.0
