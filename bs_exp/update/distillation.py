"""Training of a compressed model's factors on the dense model's predictions: one step, and one measurement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bs_exp.cache import Entry
from bs_exp.errors import CalibrationError
from bs_exp.hf_plugin import PivotedLinear, SharedLinear

# Logits per piece of the divergence: its fp32 intermediates take a few hundred MB, whatever the vocabulary.
_LOGITS = 1 << 24
# The usual 0.999 averages squared gradients over more steps than a short training has.
_BETAS = (0.9, 0.99)


def find_factors(module: nn.Module) -> dict[str, nn.Parameter]:
    """Bases and coefficients by name, a shared basis once, under the name of its first layer."""
    names: dict[nn.Parameter, str] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, SharedLinear | PivotedLinear):
            for kind, factor in (("basis", layer.basis), ("weight", layer.weight)):
                if factor.numel():  # a layer may consist of basis columns alone
                    names.setdefault(factor, f"{name}.{kind}")
    return {name: factor for factor, name in names.items()}


@contextmanager
def trainable(factors: Iterable[nn.Parameter], parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients for the factors alone; every flag is as before afterwards, and no gradient is left."""
    trained = set(factors)
    flags = {parameter: parameter.requires_grad for parameter in parameters}
    try:
        for parameter in flags:
            parameter.requires_grad_(parameter in trained)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for factor in trained:
            factor.grad = None


def kl_divergence(
    logits: Float[Tensor, "windows length vocabulary"],
    target: Float[Tensor, "windows length vocabulary"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """`T^2 KL(softmax(target / T) || softmax(logits / T))` in nats, summed over the tokens, in fp32 or better.

    Piece by piece, and once more in the backward pass, so that no fp32 copy of all logits is ever held. The factor
    `T^2` keeps gradients of different temperatures comparable (1503.02531, section 2).
    """
    rows = max(1, _LOGITS // logits.shape[-1])
    total = torch.zeros((), dtype=_precise(logits.dtype), device=logits.device)
    for part in zip(logits.flatten(0, -2).split(rows), target.flatten(0, -2).split(rows), strict=True):
        total = total + checkpoint(_kl_piece, *part, temperature, use_reentrant=False, preserve_rng_state=False)
    return total


def _kl_piece(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    precise = _precise(logits.dtype)
    log_q = (logits.to(precise) / temperature).log_softmax(-1)
    log_p = (target.to(precise) / temperature).log_softmax(-1)
    return temperature**2 * functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


@dataclass(eq=False, kw_only=True)
class Distillation:
    """A training under way: factors, their masters, and the optimiser. The factors must be `trainable`.

    Factors below fp32 have fp32 masters, which the optimiser changes and the factors follow; others are their own.
    """

    compressed: PreTrainedModel
    dense: PreTrainedModel
    factors: Mapping[str, nn.Parameter]
    learning_rate: float
    weight_decay: float
    clip_norm: float | None
    temperature: float
    autocast: bool
    windows_per_pass: int
    masters: Mapping[str, nn.Parameter] = field(init=False)
    done: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.masters = {name: _master(factor) for name, factor in self.factors.items()}
        groups = [{"params": [m], "scale": float(m.detach().square().mean().sqrt())} for m in self.masters.values()]
        self._optimizer = torch.optim.AdamW(groups, betas=_BETAS, weight_decay=self.weight_decay)
        half = any(factor.dtype is torch.float16 for factor in self.factors.values())
        self._scaler = torch.amp.GradScaler(self.dense.device.type, enabled=half)

    def step(self, ids: Int[Tensor, "windows length"], rate: float) -> float:
        """One step at a share of the learning rate; returns the loss, in nats per token.

        Raises CalibrationError if loss or gradients are not finite; fp16 steps whose gradients overflow are left out,
        and the next ones are scaled down.
        """
        total = 0.0
        for part in ids.split(self.windows_per_pass):
            loss = self._divergence(part, self.temperature, autocast=self.autocast) / ids.numel()
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
        self._publish()
        self.done += 1
        return total

    @torch.no_grad()
    def measure(self, ids: Int[Tensor, "windows length"]) -> float:
        """KL in nats per token of the factors as they are stored, at temperature 1, without autocast."""
        parts = ids.split(self.windows_per_pass)
        value = sum(self._divergence(part, 1.0, autocast=False).item() for part in parts) / ids.numel()
        self._check(value, f"held-out KL after {self.done} steps")
        return value

    def state(self) -> dict[str, Tensor]:
        """What `resume` needs, by name."""
        state = {"done": torch.tensor(self.done)}
        if self._scaler.is_enabled():
            scaler = self._scaler.state_dict()
            state["scaler"] = torch.tensor([scaler["scale"], scaler["_growth_tracker"]], dtype=torch.float64)
        for name, master in self.masters.items():
            state[f"master/{name}"] = master.detach()
            state |= {f"{key}/{name}": value for key, value in self._optimizer.state[master].items()}
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
            moments = {key: entry.tensor(f"{key}/{name}").to(master.device) for key in ("exp_avg", "exp_avg_sq")}
            self._optimizer.state[master] = {"step": entry.tensor(f"step/{name}"), **moments}
        self._publish()

    def _divergence(self, ids: Int[Tensor, "windows length"], temperature: float, *, autocast: bool) -> Tensor:
        """KL from the dense model, summed over the tokens."""
        ids = ids.to(self.dense.device)
        with torch.no_grad():
            target = self.dense(input_ids=ids, use_cache=False).logits
        with torch.autocast(self.dense.device.type, dtype=torch.bfloat16, enabled=autocast):
            logits = self.compressed(input_ids=ids, use_cache=False).logits
        return kl_divergence(logits, target, temperature)

    @torch.no_grad()
    def _collect_gradients(self) -> None:
        for name, factor in self.factors.items():
            if (master := self.masters[name]) is not factor and factor.grad is not None:
                gradient = factor.grad.to(master.dtype)
                master.grad = gradient if master.grad is None else master.grad + gradient
                factor.grad = None

    @torch.no_grad()
    def _publish(self) -> None:
        for name, factor in self.factors.items():
            if self.masters[name] is not factor:
                factor.copy_(self.masters[name])

    def _check(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise CalibrationError(
                f"Recovery: the {what} is {value}. Lower update.learning_rate (now {self.learning_rate:g}), raise "
                "update.warmup, or load the model in another dtype (model.dtype=float32 or bfloat16); update=none "
                "leaves the factors as they are."
            )


def _master(factor: nn.Parameter) -> nn.Parameter:
    precise = _precise(factor.dtype)
    return factor if precise is factor.dtype else nn.Parameter(factor.detach().to(precise))


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
