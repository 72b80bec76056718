"""What a compressed model is trained on: the dense model's predictions or outputs, or the text itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from bs_exp.models.blocks import recorded
from bs_exp.models.divergence import kl_divergence, precise
from bs_exp.models.model_inputs import Feeder, Inputs, hidden_states
from bs_exp.models.pooling import pooled
from bs_exp.types import Pooling


class Objective(Protocol):
    """What a training minimises."""

    def __call__(self, ids: Int[Tensor, "windows length"], *, training: bool) -> Float[Tensor, ""]:
        """The loss in a step of training, or as it is measured: averaged within a window, summed over the windows."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LogitDivergence:
    """KL divergence of a model's predictions from the dense model's, in nats per position (distillation, 1503.02531).

    `temperature` and `autocast` (bfloat16) are for training; the loss is measured at temperature 1, without autocast.
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
class OutputDistance:
    """Distance of a model's outputs from the dense model's, which needs no logits.

    `measure`: `cosine` is 1 - cosine of the last hidden states, averaged over the positions; `mse` their squared error,
    in units of the squared norm of the dense ones; `embedding` 1 - cosine of the sentence embeddings, by `pooling`.
    """

    compressed: PreTrainedModel
    dense: PreTrainedModel
    feeder: Feeder
    measure: str
    pooling: Pooling | None
    autocast: bool

    def __call__(self, ids: Int[Tensor, "windows length"], *, training: bool) -> Tensor:
        inputs = self.feeder.inputs(ids)
        with torch.no_grad():
            target = self._outputs(self.dense, inputs)
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self.autocast and training):
            found = self._outputs(self.compressed, inputs)
        dtype = precise(found.dtype)
        found, target = found.to(dtype), target.to(dtype)
        if self.measure == "mse":
            error = (found - target).square().flatten(1).sum(1)
            size = target.square().flatten(1).sum(1)
            return (error / size.clamp_min(torch.finfo(dtype).tiny)).sum()
        return (1.0 - functional.cosine_similarity(found, target, dim=-1)).mean(1).sum()

    def _outputs(self, module: PreTrainedModel, inputs: Inputs) -> Float[Tensor, "windows outputs d"]:
        hidden = hidden_states(module, inputs)
        if self.measure != "embedding":
            return hidden
        assert self.pooling is not None
        return pooled(hidden, inputs.get("attention_mask"), self.pooling).unsqueeze(1)


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockOutputs:
    """Squared error of every block's output, with the dense model's inputs of that block, averaged over the blocks.

    In units of the squared norm of what the dense block adds to its inputs. All blocks are trained in one step,
    independently of each other; a basis that several blocks share has the sum of their gradients.
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


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenLoss:
    """The model's own loss on the text (cross entropy), in nats per predicted token."""

    module: PreTrainedModel
    feeder: Feeder
    autocast: bool

    def __call__(self, ids: Int[Tensor, "windows length"], *, training: bool) -> Tensor:
        examples = self.feeder.examples(ids)
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self.autocast and training):
            logits = self.module(**examples.inputs).logits
        # All windows have as many predictions, so the mean over tokens is the mean over windows.
        return examples.loss(logits, reduction="mean") * len(ids)
