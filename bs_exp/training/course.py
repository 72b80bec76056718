"""The course of a training: how many steps on which windows, at which rates, and when it is measured and saved."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor

from bs_exp.cache import Entry
from bs_exp.corpora.sampling import hold_out
from bs_exp.errors import DataError
from bs_exp.training.trainer import Training
from bs_exp.validation import check_at_least, check_choice, check_number, check_positive, check_share
from bs_exp.workspace import Workspace

SCHEDULES = ("cosine", "linear", "constant")
AUTOCAST = ("none", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Course:
    """The settings that every training has, by the names that the strategies give them; it checks them."""

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
        check_at_least(0, steps=self.steps, seed=self.seed)
        check_at_least(1, batch_size=self.batch_size, accumulation=self.accumulation)
        check_at_least(1, evaluate_every=self.evaluate_every, patience=self.patience)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("autocast", self.autocast, AUTOCAST)
        check_share(warmup=self.warmup, holdout=self.holdout)
        check_positive(learning_rate=self.learning_rate, clip_norm=self.clip_norm)
        check_number(0.0, weight_decay=self.weight_decay, checkpoint_minutes=self.checkpoint_minutes)

    @classmethod
    def of(cls, settings: Any, **changes: Any) -> Self:
        """The course in the settings of a strategy."""
        return cls(**{f.name: getattr(settings, f.name) for f in fields(cls)} | changes)

    @property
    def windows_per_pass(self) -> int:
        return -(-self.batch_size // self.accumulation)

    def split(self, ids: Int[Tensor, "windows length"]) -> tuple[Tensor, Tensor]:
        """Windows to train on and windows held out, drawn by the seed; at least one of each, unless none are wanted."""
        if self.holdout == 0.0:
            return ids, ids[:0]
        if len(ids) < 2:
            raise DataError(
                f"Training needs at least 2 calibration windows, one of them held out, got {len(ids)}. Raise "
                "calibration.num_sequences, or set update=none."
            )
        kept, held_out = hold_out(len(ids), self.holdout, self.seed)
        return ids[kept], ids[held_out]

    def batches(self, windows: int) -> Int[Tensor, "steps batch"]:
        """Which windows each step sees: every one once per epoch, in an order drawn by the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        needed = self.steps * self.batch_size
        epochs = [torch.randperm(windows, generator=generator) for _ in range(-(-needed // windows))]
        return torch.cat(epochs)[:needed].view(self.steps, self.batch_size)

    def rate(self, step: int) -> float:
        """Share of the learning rate in a step (0-based): linear warm-up, then down as the schedule says."""
        warmup = round(self.warmup * self.steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / (self.steps - warmup)
        match self.schedule:
            case "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * done))
            case "linear":
                return 1.0 - done
            case _:
                return 1.0


@dataclass(eq=False)
class Run:
    """How far a training has come: what the held-out windows said, and the best parameters so far.

    Without held-out windows the last ones are the best.
    """

    course: Course
    training: Training
    held_out: Int[Tensor, "windows length"]
    history: list[tuple[int, float]] = field(default_factory=list)  # step, held-out loss; the first before any step
    best: Mapping[str, Tensor] = field(default_factory=dict)
    loss: float = math.nan
    _earlier: float = 0.0
    _start: float = field(default_factory=time.perf_counter)

    @property
    def step(self) -> int:
        return self.training.done

    @property
    def seconds(self) -> float:
        """Time spent, before interruptions too."""
        return self._earlier + time.perf_counter() - self._start

    @property
    def best_step(self) -> int:
        # The first of equals.
        return min(self.history, key=lambda entry: entry[1])[0] if self.history else self.step

    @property
    def best_loss(self) -> float:
        return min(value for _, value in self.history)

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the last `patience` evaluations brought nothing."""
        patience, steps = self.course.patience, [step for step, _ in self.history]
        stale = patience is not None and bool(steps) and len(steps) - 1 - steps.index(self.best_step) >= patience
        return self.step == self.course.steps or stale

    def follow(
        self,
        windows: Int[Tensor, "windows length"],
        *,
        label: str,
        kind: str,
        key: str,
        workspace: Workspace,
    ) -> None:
        """The whole course; the parameters are the best ones afterwards.

        With a cache folder, an interrupted training goes on from its last checkpoint, to the same bits, and a finished
        one is not repeated.
        """
        cache = workspace.cache
        stored = None if cache.folder is None else cache.find(kind, key)
        if stored is not None:
            self._resume(stored)
            workspace.progress.note(f"{label}: {self.step} of {self.course.steps} steps came from the cache")
        else:
            self._evaluate()
        if not self.finished:
            saved = time.perf_counter()
            batches = self.course.batches(len(windows))[self.step :]
            for batch in workspace.progress.track(
                batches, label=lambda: f"{label}, loss {self.loss:.4f}", total=len(batches)
            ):
                self._advance(windows[batch])
                if self.finished:
                    break
                if cache.folder is not None and self._is_due(saved):
                    cache.store(kind, key, self._state())
                    saved = time.perf_counter()
            if not self.history:
                self.best = self._copies()
            if cache.folder is not None:
                cache.store(kind, key, self._state())
        self._restore_best()

    def report(self) -> dict[str, Any]:
        """What was done, and what it cost."""
        return {
            "steps": self.step,
            "best_step": self.best_step,
            "seconds": round(self.seconds, 3),
            "trained_parameters": sum(p.numel() for p in self.training.parameters.values()),
            "held_out_windows": len(self.held_out),
        }

    def _is_due(self, saved: float) -> bool:
        minutes = self.course.checkpoint_minutes
        return minutes is not None and (time.perf_counter() - saved) / 60.0 >= minutes

    def _advance(self, ids: Int[Tensor, "batch length"]) -> None:
        """One step of training, and an evaluation where one is due."""
        self.loss = self.training.step(ids, self.course.rate(self.step))
        if self.step % self.course.evaluate_every == 0 or self.step == self.course.steps:
            self._evaluate()

    def _evaluate(self) -> None:
        """Asks the held-out windows, if there are any; the best parameters are copied."""
        if not len(self.held_out):
            return
        value = self.training.measure(self.held_out)
        if not self.history or value < self.best_loss:
            self.best = self._copies()
        self.history.append((self.step, value))

    def _copies(self) -> dict[str, Tensor]:
        # To the CPU: they are read once, at the end.
        return {name: p.detach().to("cpu", copy=True) for name, p in self.training.parameters.items()}

    @torch.no_grad()
    def _restore_best(self) -> None:
        for name, value in self.best.items():
            self.training.parameters[name].copy_(value)

    def _state(self) -> dict[str, Tensor]:
        """What `_resume` needs, by name; of a finished run, only its result."""
        state = {f"best/{name}": value for name, value in self.best.items()}
        state["history"] = torch.tensor(self.history, dtype=torch.float64).view(-1, 2)
        state["seconds"] = torch.tensor(self.seconds, dtype=torch.float64)
        return state | ({"done": torch.tensor(self.step)} if self.finished else self.training.state())

    def _resume(self, entry: Entry) -> None:
        """Continues from a stored `_state`."""
        self._earlier = float(entry.tensor("seconds"))
        self.history = [(int(step), value) for step, value in entry.tensor("history").tolist()]
        self.training.done = int(entry.tensor("done"))
        if self.history or self.finished:
            self.best = {name: entry.tensor(f"best/{name}") for name in self.training.parameters}
        if not self.finished:
            self.training.resume(entry)
