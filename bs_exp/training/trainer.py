"""Training of some parameters of a model: steps, held-out measurements, checkpoints, and the best parameters."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from bs_exp.cache import Entry
from bs_exp.errors import CalibrationError
from bs_exp.models.divergence import precise
from bs_exp.training.objectives import Objective
from bs_exp.training.optimizers import ADAMW, OptimizerSettings, make_optimizer, state_names
from bs_exp.training.settings import TrainerSettings, draw_batches, rate_factor
from bs_exp.workspace import Workspace

# So many times the first held-out loss is too much to be left to smaller steps to come.
_LOST = 2.0
# Smaller steps than this share of the asked ones change next to nothing.
_LEAST_RATE = 4.0**-8


@contextmanager
def trainable(trained: Iterable[nn.Parameter], parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients for `trained` alone among `parameters`; afterwards every flag is as before, and no gradient is left."""
    chosen = set(trained)
    flags = {parameter: parameter.requires_grad for parameter in parameters}
    try:
        for parameter in flags:
            parameter.requires_grad_(parameter in chosen)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for parameter in chosen:
            parameter.grad = None


@dataclass(eq=False, kw_only=True)
class Trainer:
    """Trains parameters, which must be `trainable`, on windows; keeps those that do best on held-out windows.

    Without held-out windows the last parameters are kept. `name` stands in error messages. `step_scales` multiply the
    learning rate, by parameter. Parameters below fp32 have fp32 copies ("masters") that the optimiser changes and that
    are rounded into the parameters after each step; other parameters are their own masters. `stored` names parameters
    that will be kept in another dtype than they have now, and are rounded as if they had it. `scale_loss` is for
    gradients that pass through fp16: the loss is scaled up, so that they do not underflow. Random numbers are drawn
    from `settings.seed` and the number of the step, so an interrupted training continues to the same bits.

    With `back_off`, a held-out loss that is more than twice that before any step, or any loss or gradient that is
    not finite, sends training back to its best parameters, where it goes on with a quarter of the learning rate and
    an optimiser that knows nothing yet.

    `done` counts the steps so far. `history` has the step and the held-out loss of every measurement, in the unit of
    the objective; the first one is before any step.
    """

    name: str
    settings: TrainerSettings
    optimizer: OptimizerSettings = ADAMW
    parameters: Mapping[str, nn.Parameter]
    step_scales: Mapping[str, float]
    objective: Objective
    windows: Int[Tensor, "windows length"]
    held_out: Int[Tensor, "held_out length"]
    device: torch.device
    scale_loss: bool
    back_off: bool = False
    stored: Mapping[str, torch.dtype] = field(default_factory=dict)
    masters: Mapping[str, nn.Parameter] = field(init=False)
    done: int = field(init=False, default=0)
    history: list[tuple[int, float]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.stored = {name: parameter.dtype for name, parameter in self.parameters.items()} | dict(self.stored)
        self.masters = {name: self._master(name) for name in self.parameters}
        self._optimizer = self._new_optimizer()
        self._rate, self._measured_before = 1.0, 0  # entries of `history` in front of the last going back
        self._scaler = self._new_scaler()
        self._best: Mapping[str, Tensor] = {}
        self._loss, self._earlier_seconds = math.nan, 0.0
        self._start = time.perf_counter()

    @property
    def learning_rate(self) -> float:
        """The learning rate that the schedule refers to now."""
        return self.settings.learning_rate * self._rate

    @property
    def best_step(self) -> int:
        """Steps after which the held-out loss was lowest (the first of equals); the last step if none is held out."""
        return min(self.history, key=lambda entry: entry[1])[0] if self.history else self.done

    @property
    def best_loss(self) -> float:
        return min(value for _, value in self.history)

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the last `patience` measurements brought no gain."""
        patience, steps = self.settings.patience, [step for step, _ in self.history]
        last = max(steps.index(self.best_step), self._measured_before - 1) if steps else 0
        stale = patience is not None and bool(steps) and len(steps) - 1 - last >= patience
        return self.done == self.settings.steps or stale

    @property
    def seen(self) -> Int[Tensor, " seen"]:
        """Positions in `windows` of those that the steps so far have trained on, each once, ascending."""
        positions: Tensor = draw_batches(len(self.windows), self.settings)[: self.done].unique()
        return positions

    def train(self, workspace: Workspace, *, label: str, kind: str, key: str | None) -> None:
        """Takes all steps, unless it stops early; the parameters are the best ones afterwards.

        With a `key`, checkpoints and the result are stored in the cache: an interrupted training continues from its
        last checkpoint, to the same bits, and a finished one is not repeated. `label` is what the user sees.
        """
        stored = None if key is None else workspace.cache.find(kind, key)
        if stored is None:
            self._evaluate()
        else:
            self.resume(stored)
            workspace.progress.note(f"{label}: {self.done} of {self.settings.steps} steps came from the cache")
        if not self.finished:
            self._take_steps(workspace, label=label, kind=kind, key=key)
            if key is not None:
                workspace.cache.store(kind, key, self.state())
        self._restore_best()

    def step(self, ids: Int[Tensor, "batch length"], rate: float) -> float:
        """One step at a share of the learning rate; returns the loss before it, averaged over the windows.

        Raises CalibrationError if loss or gradients are not finite; an fp16 step whose gradients overflow is taken
        again with the loss scaled down, until they fit.
        """
        scale = self._scaler.get_scale()
        loss = self._attempt(ids, rate)
        while self._scaler.get_scale() < scale:  # it overflowed, and nothing was changed
            scale = self._scaler.get_scale()
            loss = self._attempt(ids, rate)
        self._round_into_parameters()
        self.done += 1
        return loss

    @torch.no_grad()
    def measure(self, ids: Int[Tensor, "windows length"]) -> float:
        """The loss of the parameters as they are stored, averaged over the windows."""
        parts = ids.split(-(-self.settings.batch_size // self.settings.accumulation))
        value = sum(self.objective(part.to(self.device), training=False).item() for part in parts) / len(ids)
        self._check_finite(value, f"held-out loss after {self.done} steps")
        return value

    def state(self) -> dict[str, Tensor]:
        """What `resume` needs, by name; of a finished training, only its result."""
        state = {f"best/{name}": value for name, value in self._best.items()}
        state["history"] = torch.tensor(self.history, dtype=torch.float64).view(-1, 2)
        state["seconds"] = torch.tensor(self._seconds, dtype=torch.float64)
        state["done"] = torch.tensor(self.done)
        if self.back_off:
            state["rate"] = torch.tensor([self._rate, self._measured_before], dtype=torch.float64)
        if self.finished:
            return state
        if self._scaler.is_enabled():
            scaler = self._scaler.state_dict()
            state["scaler"] = torch.tensor([scaler["scale"], scaler["_growth_tracker"]], dtype=torch.float64)
        for name, master in self.masters.items():
            state[f"master/{name}"] = master.detach()
            # Without a gradient the optimiser keeps nothing of a parameter.
            kept = self._optimizer.state.get(master, {})
            state[f"stepped/{name}"] = torch.tensor(len(kept) > 0)
            state |= {f"{key}/{name}": value for key, value in kept.items()}
        return state

    @torch.no_grad()
    def resume(self, entry: Entry) -> None:
        """Continues from a stored `state`."""
        self._earlier_seconds = float(entry.tensor("seconds"))
        self.history = [(int(step), value) for step, value in entry.tensor("history").tolist()]
        self.done = int(entry.tensor("done"))
        if self.back_off:
            rate, before = entry.tensor("rate").tolist()
            self._rate, self._measured_before = rate, int(before)
        if self.history or self.finished:
            self._best = {name: entry.tensor(f"best/{name}") for name in self.parameters}
        if self.finished:
            return
        if self._scaler.is_enabled():
            scale, growth = entry.tensor("scaler").tolist()
            self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": scale, "_growth_tracker": int(growth)})
        for name, master in self.masters.items():
            master.copy_(entry.tensor(f"master/{name}"))
            if int(entry.tensor(f"stepped/{name}")) == 0:
                continue
            kept = {key: entry.tensor(f"{key}/{name}") for key in state_names(self.optimizer)}
            # Step counts stay where the optimisers keep them: on the CPU.
            self._optimizer.state[master] = {
                key: value if key == "step" else value.to(master.device) for key, value in kept.items()
            }
        self._round_into_parameters()

    def report(self) -> dict[str, Any]:
        """What was done, and what it cost. `training_windows` counts the different windows that steps have seen."""
        return {
            "steps": self.done,
            "best_step": self.best_step,
            "seconds": round(self._seconds, 3),
            "trained_parameters": sum(p.numel() for p in self.parameters.values()),
            "training_windows": len(self.seen),
            "held_out_windows": len(self.held_out),
        }

    @property
    def _seconds(self) -> float:
        """Time spent, before interruptions too."""
        return self._earlier_seconds + time.perf_counter() - self._start

    def _take_steps(self, workspace: Workspace, *, label: str, kind: str, key: str | None) -> None:
        """The steps that are left, with measurements and checkpoints where they are due."""
        saved = time.perf_counter()
        batches = draw_batches(len(self.windows), self.settings)[self.done :]
        for batch in workspace.progress.track(
            batches, label=lambda: f"{label}, loss {self._loss:.4f}", total=len(batches)
        ):
            before = self.done
            try:
                self._loss = self.step(self.windows[batch], rate_factor(self.done, self.settings))
                if self.done % self.settings.evaluate_every == 0 or self.done == self.settings.steps:
                    self._evaluate()
                told = self._lost()
            except CalibrationError as error:
                if not self._may_go_back():
                    raise
                self.done, told = before + 1, str(error)
            if told is not None and self._may_go_back() and self.done < self.settings.steps:
                self._go_back()
                workspace.progress.note(
                    f"{label}: {told.removesuffix('.')}; after {self.done} steps it goes on from the best factors, of "
                    f"step {self.best_step}, with learning rate {self.learning_rate:g}"
                )
            if self.finished:
                break
            if key is not None and self._is_due(saved):
                workspace.cache.store(kind, key, self.state())
                saved = time.perf_counter()
        if not self.history:
            self._best = self._copies()

    def _is_due(self, saved: float) -> bool:
        minutes = self.settings.checkpoint_minutes
        return minutes is not None and (time.perf_counter() - saved) / 60.0 >= minutes

    def _attempt(self, ids: Int[Tensor, "batch length"], rate: float) -> float:
        loss = 0.0
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed((self.settings.seed * 1_000_003 + self.done) % 2**63)
            for part in ids.tensor_split(self.settings.accumulation):
                share = self.objective(part.to(self.device), training=True) / len(ids)
                self._scaler.scale(share).backward()
                self._collect_gradients()
                loss += share.item()
        self._check_finite(loss, f"loss of step {self.done + 1}")
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate * group["scale"] * rate
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self.masters.values(), self.settings.clip_norm or math.inf)
        if not self._scaler.is_enabled() or self._scaler.get_scale() < 1.0:
            self._check_finite(norm.item(), f"norm of the gradient in step {self.done + 1}")
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        return loss

    @torch.no_grad()
    def _collect_gradients(self) -> None:
        """Adds the gradients of parameters that have masters of their own to those of these."""
        for name, parameter in self.parameters.items():
            if (master := self.masters[name]) is not parameter and parameter.grad is not None:
                gradient = parameter.grad.to(master.dtype)
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

    @torch.no_grad()
    def _round_into_parameters(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name].to(self.stored[name]))

    def _master(self, name: str) -> nn.Parameter:
        parameter, stored = self.parameters[name], self.stored[name]
        if stored is parameter.dtype is precise(stored):
            return parameter
        return nn.Parameter(parameter.detach().to(precise(stored), copy=True))

    def _evaluate(self) -> None:
        """Measures the held-out windows, if there are any; the best parameters are copied."""
        if not len(self.held_out):
            return
        value = self.measure(self.held_out)
        if not self.history or value < self.best_loss:
            self._best = self._copies()
        self.history.append((self.done, value))

    def _lost(self) -> str | None:
        """What was measured just now, if it is well above the first measurement."""
        if not self.history or self.history[-1][0] != self.done or self.history[-1][1] <= _LOST * self.history[0][1]:
            return None
        return f"the held-out loss went from {self.history[0][1]:.4g} to {self.history[-1][1]:.4g}"

    def _may_go_back(self) -> bool:
        """Whether that is wanted, there is something to go back to, and smaller steps may help."""
        return self.back_off and bool(self._best) and self._rate > _LEAST_RATE

    @torch.no_grad()
    def _go_back(self) -> None:
        """To the best parameters, with a quarter of the learning rate."""
        self._restore_best()
        for name, master in self.masters.items():
            master.grad = None
            if master is not self.parameters[name]:
                master.copy_(self.parameters[name])
                self.parameters[name].grad = None
        self._optimizer = self._new_optimizer()
        # A step that failed half-way leaves it in the middle of one.
        self._scaler = self._new_scaler(self._scaler.get_scale())
        self._rate /= 4.0
        self._measured_before = len(self.history)

    def _new_scaler(self, scale: float | None = None) -> torch.amp.GradScaler:
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.scale_loss)
        if scale is not None and scaler.is_enabled():
            scaler.load_state_dict({**scaler.state_dict(), "scale": scale})
        return scaler

    def _new_optimizer(self) -> torch.optim.Optimizer:
        groups = [{"params": [master], "scale": self.step_scales[name]} for name, master in self.masters.items()]
        return make_optimizer(self.optimizer, groups, weight_decay=self.settings.weight_decay)

    def _copies(self) -> dict[str, Tensor]:
        # To the CPU: they are read once, at the end.
        return {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}

    @torch.no_grad()
    def _restore_best(self) -> None:
        for name, value in self._best.items():
            self.parameters[name].copy_(value)

    def _check_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise CalibrationError(
                f"{self.name}: the {what} is {value}. Lower learning_rate (now "
                f"{self.learning_rate:g}), raise warmup, or load the model in another dtype "
                "(model.dtype=float32 or bfloat16); update=none leaves the factors as they are."
            )
