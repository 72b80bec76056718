"""The factors are trained to give the dense model's predictions on the calibration windows."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from bs_exp.cache import Cache, Entry, content_key
from bs_exp.checks import check_at_least, check_choice, check_share
from bs_exp.errors import ConfigError, DataError
from bs_exp.journal import Journal
from bs_exp.models.fingerprint import fingerprint
from bs_exp.protocols import Calibration
from bs_exp.types import LoadedModel, TokenWindows
from bs_exp.update.distillation import Distillation, find_factors, trainable

KIND = "recovery"
SCHEDULES = ("cosine", "linear", "constant")
AUTOCAST = ("none", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Trains bases and coefficients, and nothing else, by AdamW on the KL divergence from the dense model's logits.

    A part of the calibration windows is held out; the factors that do best on it are kept, which may be the ones that
    were there before. A factor's step size is `learning_rate` times its root mean square at the start. Half-precision
    factors are trained in fp32 copies. Distillation: Hinton et al. (1503.02531), section 2.
    """

    steps: int
    batch_size: int
    accumulation: int
    learning_rate: float
    schedule: str
    warmup: float
    weight_decay: float
    clip_norm: float | None
    temperature: float
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
        if self.holdout == 0.0:
            raise ConfigError("holdout must be above 0: without held-out windows nobody knows when training does harm.")
        positive = {"learning_rate": self.learning_rate, "temperature": self.temperature, "clip_norm": self.clip_norm}
        for name, value in positive.items():
            if value is not None and not 0.0 < value < math.inf:
                raise ConfigError(f"{name} must be above 0, got {value}.")
        for name, value in (("weight_decay", self.weight_decay), ("checkpoint_minutes", self.checkpoint_minutes)):
            if value is not None and not 0.0 <= value < math.inf:
                raise ConfigError(f"{name} must be at least 0, got {value}.")

    def apply(
        self, compressed: PreTrainedModel, dense: LoadedModel, calibration: Calibration, cache: Cache, journal: Journal
    ) -> Mapping[str, Any]:
        """Trains in place; reports the cost, and the held-out KL in nats per token at temperature 1.

        With a cache folder, an interrupted training goes on from its last checkpoint, to the same bits, and a finished
        one is not repeated.
        """
        factors = find_factors(compressed)
        if not factors or not self.steps:
            journal.note("recovery: no steps asked for" if factors else "recovery: there are no factors to train")
            return {"strategy": KIND, "steps": 0, "tokens": 0, "seconds": 0.0}
        windows = calibration.windows(dense.tokenizer)
        training, held_out = self.split(windows.ids)
        key = None if cache.folder is None else self._key(compressed, dense, windows)
        with trainable(factors.values(), chain(compressed.parameters(), dense.module.parameters())):
            run = _Run(self, self._distillation(compressed, dense, factors), held_out)
            if key is not None and (entry := cache.find(KIND, key)) is not None:
                run.resume(entry)
                journal.note(f"recovery: {run.step} of {self.steps} steps came from the cache")
            else:
                run.evaluate()
            if not run.finished:
                self._train(run, training, cache, key, journal)
        run.restore_best()
        report = {
            "strategy": KIND,
            "steps": run.step,
            "best_step": run.best_step,
            "tokens": run.step * self.batch_size * training.shape[1],
            "seconds": round(run.seconds, 3),
            "trained_parameters": sum(factor.numel() for factor in factors.values()),
            "training_windows": len(training),
            "held_out_windows": len(held_out),
            "held_out_kl_before": run.history[0][1],
            "held_out_kl_after": run.best_kl,
            "held_out_kl": [[step, value] for step, value in run.history],
        }
        journal.note(_summary(report))
        return report

    def split(self, ids: Int[Tensor, "windows length"]) -> tuple[Tensor, Tensor]:
        """Windows to train on and windows held out, drawn by the seed; at least one of each."""
        if len(ids) < 2:
            raise DataError(
                f"Recovery needs at least 2 calibration windows, one of them held out, got {len(ids)}. Raise "
                "calibration.num_sequences, or set update=none."
            )
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(self.seed))
        count = min(max(1, round(self.holdout * len(ids))), len(ids) - 1)
        return ids[order[count:].sort().values], ids[order[:count].sort().values]

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

    def _key(self, compressed: PreTrainedModel, dense: LoadedModel, windows: TokenWindows) -> str:
        settings = {name: value for name, value in asdict(self).items() if name != "checkpoint_minutes"}
        return content_key(
            dense=dense.fingerprint,
            compressed=fingerprint(compressed),
            device=dense.device.type,
            windows=windows.provenance["sha256"],
            settings=settings,
        )

    def _distillation(
        self, compressed: PreTrainedModel, dense: LoadedModel, factors: Mapping[str, nn.Parameter]
    ) -> Distillation:
        return Distillation(
            compressed=compressed,
            dense=dense.module,
            factors=factors,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            temperature=self.temperature,
            autocast=self.autocast == "bfloat16",
            windows_per_pass=-(-self.batch_size // self.accumulation),
        )

    def _train(self, run: _Run, training: Tensor, cache: Cache, key: str | None, journal: Journal) -> None:
        batches = self.batches(len(training))[run.step :]
        saved = time.perf_counter()
        for batch in journal.track(batches, label=lambda: f"recovering, KL {run.loss:.4f}", total=len(batches)):
            run.advance(training[batch])
            if run.finished:
                break
            minutes = (time.perf_counter() - saved) / 60.0
            if key is not None and self.checkpoint_minutes is not None and minutes >= self.checkpoint_minutes:
                cache.store(KIND, key, run.state())
                saved = time.perf_counter()
        if key is not None:
            cache.store(KIND, key, run.state())


@dataclass(eq=False)
class _Run:
    """How far a recovery has come: what the held-out windows said, and the best factors so far."""

    settings: Recovery
    training: Distillation
    held_out: Int[Tensor, "windows length"]
    history: list[tuple[int, float]] = field(default_factory=list)  # step, held-out KL; the first one before any step
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
        return min(self.history, key=lambda entry: entry[1])[0]  # the first of equals

    @property
    def best_kl(self) -> float:
        return min(value for _, value in self.history)

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the last `patience` evaluations brought nothing."""
        patience, steps = self.settings.patience, [step for step, _ in self.history]
        stale = patience is not None and len(steps) - 1 - steps.index(self.best_step) >= patience
        return self.step == self.settings.steps or stale

    def advance(self, ids: Int[Tensor, "batch length"]) -> None:
        """One step of training, and an evaluation where one is due."""
        self.loss = self.training.step(ids, self.settings.rate(self.step))
        if self.step % self.settings.evaluate_every == 0 or self.step == self.settings.steps:
            self.evaluate()

    def evaluate(self) -> None:
        """Asks the held-out windows; the best factors are copied."""
        value = self.training.measure(self.held_out)
        if not self.history or value < self.best_kl:
            # To the CPU: they are read once, at the end.
            self.best = {name: f.detach().to("cpu", copy=True) for name, f in self.training.factors.items()}
        self.history.append((self.step, value))

    @torch.no_grad()
    def restore_best(self) -> None:
        for name, factor in self.training.factors.items():
            factor.copy_(self.best[name])

    def state(self) -> dict[str, Tensor]:
        """What `resume` needs, by name; of a finished run, only its result."""
        state = {f"best/{name}": value for name, value in self.best.items()}
        state["history"] = torch.tensor(self.history, dtype=torch.float64)
        state["seconds"] = torch.tensor(self.seconds, dtype=torch.float64)
        return state | ({"done": torch.tensor(self.step)} if self.finished else self.training.state())

    def resume(self, entry: Entry) -> None:
        """Continues from a stored `state`."""
        self._earlier = float(entry.tensor("seconds"))
        self.history = [(int(step), value) for step, value in entry.tensor("history").tolist()]
        self.best = {name: entry.tensor(f"best/{name}") for name in self.training.factors}
        self.training.done = int(entry.tensor("done"))
        if not self.finished:
            self.training.resume(entry)


def _summary(report: Mapping[str, Any]) -> str:
    steps, before, after = report["steps"], report["held_out_kl_before"], report["held_out_kl_after"]
    if report["best_step"] == 0:
        return (
            f"recovery: {steps} steps did not lower the held-out KL of {before:.4g} nats per token, so the factors "
            "stay as they were (try a lower update.learning_rate)"
        )
    return (
        f"recovery: held-out KL {before:.4g} -> {after:.4g} nats per token, factors of step {report['best_step']} of "
        f"{steps}"
    )
