"""Training of some parameters of a model: one step, one measurement, and what it takes to go on later."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bs_exp.cache import Entry
from bs_exp.errors import CalibrationError
from bs_exp.training.soap import Soap

# The usual 0.999 averages squared gradients over more steps than a short training has.
_BETAS = (0.9, 0.99)
OPTIMIZERS = ("adamw", "soap")


@dataclass(frozen=True, kw_only=True)
class OptimizerDials:
    """Which optimiser: AdamW, or SOAP with bases renewed every `renewal` steps for sides up to `longest`."""

    kind: str = "adamw"
    renewal: int = 1
    longest: int = 0

    def make(self, groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
        if self.kind == "soap":
            return Soap(groups, betas=_BETAS, weight_decay=weight_decay, renewal=self.renewal, longest=self.longest)
        return torch.optim.AdamW(groups, betas=_BETAS, weight_decay=weight_decay)

    @property
    def state(self) -> tuple[str, ...]:
        """What the optimiser keeps of each parameter."""
        return Soap.STATE if self.kind == "soap" else ("step", "exp_avg", "exp_avg_sq")


class Objective(Protocol):
    """What a training minimises."""

    def __call__(self, ids: Int[Tensor, "windows length"], *, training: bool) -> Float[Tensor, ""]:
        """The loss in a step of training, or as it is measured: mean by window, summed over the windows."""


@contextmanager
def trainable(trained: Iterable[nn.Parameter], parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients for some parameters alone; every flag is as before afterwards, and no gradient is left."""
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
class Training:
    """A training under way: parameters, their masters, and the optimiser. The parameters must be `trainable`.

    Parameters below fp32 have fp32 masters, which the optimiser changes and the parameters follow; others are their
    own. `scales` multiply the learning rate by parameter. `half` says that gradients pass through fp16, so that they
    must be scaled. Random numbers are drawn from `seed` and the number of the step.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    scales: Mapping[str, float]
    objective: Objective
    device: torch.device
    half: bool
    learning_rate: float
    weight_decay: float
    clip_norm: float | None
    windows_per_pass: int
    seed: int
    optimizer: OptimizerDials = OptimizerDials()
    masters: Mapping[str, nn.Parameter] = field(init=False)
    done: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.masters = {name: _master(parameter) for name, parameter in self.parameters.items()}
        groups = [{"params": [master], "scale": self.scales[name]} for name, master in self.masters.items()]
        self._optimizer = self.optimizer.make(groups, self.weight_decay)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.half)

    def step(self, ids: Int[Tensor, "windows length"], rate: float) -> float:
        """One step at a share of the learning rate; returns the loss, averaged over the windows.

        Raises CalibrationError if loss or gradients are not finite; an fp16 step whose gradients overflow is taken
        again with them scaled down, until they fit.
        """
        scale = self._scaler.get_scale()
        total = self._attempt(ids, rate)
        while self._scaler.get_scale() < scale:  # it overflowed, and nothing was changed
            scale = self._scaler.get_scale()
            total = self._attempt(ids, rate)
        self._publish()
        self.done += 1
        return total

    def _attempt(self, ids: Int[Tensor, "windows length"], rate: float) -> float:
        total = 0.0
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed((self.seed * 1_000_003 + self.done) % 2**63)
            for part in ids.split(self.windows_per_pass):
                loss = self.objective(part.to(self.device), training=True) / len(ids)
                self._scaler.scale(loss).backward()
                self._collect_gradients()
                total += loss.item()
        self._check(total, f"loss of step {self.done + 1}")
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate * group["scale"] * rate
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self.masters.values(), self.clip_norm or math.inf)
        if not self._scaler.is_enabled() or self._scaler.get_scale() < 1.0:
            self._check(norm.item(), f"norm of the gradient in step {self.done + 1}")
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        return total

    @torch.no_grad()
    def measure(self, ids: Int[Tensor, "windows length"]) -> float:
        """The loss of the parameters as they are stored, averaged over the windows."""
        parts = ids.split(self.windows_per_pass)
        value = sum(self.objective(part.to(self.device), training=False).item() for part in parts) / len(ids)
        self._check(value, f"held-out loss after {self.done} steps")
        return value

    def state(self) -> dict[str, Tensor]:
        """What `resume` needs, by name."""
        state = {"done": torch.tensor(self.done)}
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
        self.done = int(entry.tensor("done"))
        if self._scaler.is_enabled():
            scale, growth = entry.tensor("scaler").tolist()
            self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": scale, "_growth_tracker": int(growth)})
        for name, master in self.masters.items():
            master.copy_(entry.tensor(f"master/{name}"))
            if int(entry.tensor(f"stepped/{name}")) == 0:
                continue
            kept = {key: entry.tensor(f"{key}/{name}") for key in self.optimizer.state}
            # Step counts stay where the optimisers keep them: on the CPU.
            self._optimizer.state[master] = {
                key: value if key == "step" else value.to(master.device) for key, value in kept.items()
            }
        self._publish()

    @torch.no_grad()
    def _collect_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            if (master := self.masters[name]) is not parameter and parameter.grad is not None:
                gradient = parameter.grad.to(master.dtype)
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def _check(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise CalibrationError(
                f"{self.name}: the {what} is {value}. Lower update.learning_rate (now {self.learning_rate:g}), raise "
                "update.warmup, or load the model in another dtype (model.dtype=float32 or bfloat16); update=none "
                "leaves the factors as they are."
            )


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype, or fp32 if that is finer."""
    return torch.promote_types(dtype, torch.float32)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    dtype = precise(parameter.dtype)
    return parameter if dtype is parameter.dtype else nn.Parameter(parameter.detach().to(dtype))
