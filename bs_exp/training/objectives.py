"""What a compressed model is trained on: the dense model's predictions, or the outputs of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bs_exp.models.blocks import recorded
from bs_exp.models.model_inputs import Feeder, hidden_states
from bs_exp.models.modeling_basis_sharing import CorrectedLinear, FactorisedLinear
from bs_exp.training.trainer import precise

# Logits per piece of the divergence: its fp32 intermediates take a few hundred MB, whatever the vocabulary.
_LOGITS = 1 << 24


def find_factors(module: nn.Module) -> dict[str, nn.Parameter]:
    """Bases, coefficients and corrections by name, a shared basis once, under the name of its first layer."""
    names: dict[nn.Parameter, str] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, FactorisedLinear):
            for kind, factor in (("basis", layer.basis), ("weight", layer.weight)):
                if factor.numel():  # empty at full rank, where all is the identity
                    names.setdefault(factor, f"{name}.{kind}")
        elif isinstance(layer, CorrectedLinear):
            names |= {layer.down: f"{name}.down", layer.weight: f"{name}.weight"}
    return {name: factor for factor, name in names.items()}


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
    total = torch.zeros((), dtype=precise(logits.dtype), device=logits.device)
    for part in zip(logits.flatten(0, -2).split(rows), target.flatten(0, -2).split(rows), strict=True):
        total = total + checkpoint(_kl_piece, *part, temperature, use_reentrant=False, preserve_rng_state=False)
    return total


def _kl_piece(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    dtype = precise(logits.dtype)
    log_q = (logits.to(dtype) / temperature).log_softmax(-1)
    log_p = (target.to(dtype) / temperature).log_softmax(-1)
    return temperature**2 * functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


@dataclass(frozen=True, eq=False, kw_only=True)
class LogitDivergence:
    """KL divergence of a model's predictions from the dense model's, in nats per position.

    Measured at temperature 1, without autocast.
    """

    compressed: PreTrainedModel
    dense: PreTrainedModel
    feeder: Feeder
    temperature: float
    autocast: bool

    def __call__(self, ids: Int[Tensor, "windows length"], *, training: bool) -> Tensor:
        inputs = self.feeder.examples(ids).inputs
        with torch.no_grad():
            target = self.dense(**inputs).logits
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self.autocast and training):
            logits = self.compressed(**inputs).logits
        divergence = kl_divergence(logits, target, self.temperature if training else 1.0)
        return divergence / int(logits.shape[1])


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockOutputs:
    """Squared error of every block's output on the dense model's inputs of that block, in units of what the dense block
    adds to them, averaged over the blocks.

    All blocks are trained at once, each on its own, so that a basis which blocks share hears of all of them.
    """

    compressed: PreTrainedModel
    dense: PreTrainedModel
    feeder: Feeder
    paths: Sequence[str]
    autocast: bool

    def __call__(self, ids: Int[Tensor, "windows length"], *, training: bool) -> Tensor:
        with torch.no_grad(), recorded(self.dense, self.paths) as calls:
            hidden_states(self.dense, self.feeder.inputs(ids))
        total = torch.zeros((), dtype=precise(self.dense.dtype), device=ids.device)
        for path, call in calls.items():
            with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self.autocast and training):
                output = call.on(self.compressed.get_submodule(path), call.hidden)
            error = (output.to(total.dtype) - call.output.to(total.dtype)).square().flatten(1).sum(1)
            added = (call.output.to(total.dtype) - call.hidden.to(total.dtype)).square().flatten(1).sum(1)
            total = total + (error / added.clamp_min(torch.finfo(total.dtype).tiny)).sum() / len(calls)
        return total
