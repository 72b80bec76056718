"""LoRA adapters of factors (peft): one for each factor, so that layers which share a basis share its adapter too.

They are trained on a twin whose factorised layers are pairs of `nn.Linear` that hold the same Parameters as the model:
so peft never forms the product of an adapter. Adapters that are kept are attached to the model itself, as adapters of
Parameters, the form that `PeftModel.from_pretrained` can load.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bs_exp.models.modeling_basis_sharing import FactorisedLinear
from bs_exp.models.surgery import twin

ADAPTER = "default"
KINDS = ("basis", "weight")
# What peft calls the model inside a PeftModel.
_PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class Adapter:
    """`factor + scaling * up @ down`: the low-rank change of one factor `[out, in]`."""

    factor: nn.Parameter
    down: nn.Parameter
    up: nn.Parameter
    scaling: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the change to the factor in place, computed in fp64 and rounded once to the factor's dtype."""
        change = self.up.double() @ self.down.double()
        self.factor.copy_(self.factor.double() + self.scaling * change)


@dataclass(frozen=True, eq=False)
class AdaptedTwin:
    """A model that shares every parameter with the compressed one, and its adapters by factor (`MODULE.basis`)."""

    module: PreTrainedModel
    adapters: Mapping[str, Adapter]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name: `down` and `up` of every adapter."""
        pairs = self.adapters.items()
        return {f"{name}.{part}": getattr(adapter, part) for name, adapter in pairs for part in ("down", "up")}

    def set_dropout(self, active: bool) -> None:
        """Turns dropout in front of the adapters on or off; the model's own dropout is left as it is."""
        for layer in self.module.modules():
            if isinstance(layer, LoraLayer):
                layer.lora_dropout.train(active)


def adapted_twin(
    model: PreTrainedModel, factors: Iterable[str], *, rank: int, alpha: float, dropout: float, seed: int
) -> AdaptedTwin:
    """A twin with an adapter on each named factor (`MODULE.basis` or `MODULE.weight`, a shared basis by any member).

    An adapter has `rank`, or the length of its factor's smaller side if that is less, since a higher rank adds nothing.
    All are scaled by `alpha / rank` and start at no change: `down` is uniform within +-1 / sqrt(d_in), drawn by `seed`,
    `up` is zero (LoRA, 2106.09685, section 4.1, as peft does it). They are in fp32, or in the factor's dtype if that is
    finer. Side effect: `requires_grad` of the model's parameters changes.
    """
    wanted = {id(model.get_parameter(name)): name for name in reversed(list(factors))}
    module = twin(model)
    linears: dict[int, nn.Linear] = {}
    for name, layer in list(module.named_modules()):
        if isinstance(layer, FactorisedLinear):
            module.set_submodule(name, _FactorPair(layer, linears))
    # peft puts an adapter at the first place of a shared basis only; the last loop puts it at the other places.
    ranks = {
        name: min(rank, *_plain(part).weight.shape)
        for name, part in module.named_modules()
        if _factor_id(part) in wanted
    }
    config = _config(rank, alpha, ranks, lora_dropout=dropout, target_modules=list(ranks))
    inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    found = {id(part.base_layer.weight): part for part in module.modules() if isinstance(part, LoraLayer)}
    generator = torch.Generator().manual_seed(seed)
    adapters: dict[str, Adapter] = {}
    for key, name in sorted(wanted.items(), key=lambda item: item[1]):
        wrapped: Any = found[key]
        dtype = torch.promote_types(wrapped.base_layer.weight.dtype, torch.float32)
        down, up = wrapped.lora_A[ADAPTER].to(dtype), wrapped.lora_B[ADAPTER].to(dtype)
        bound = 1.0 / math.sqrt(down.in_features)
        values = torch.rand(down.weight.shape, generator=generator, dtype=torch.float64) * 2.0 * bound - bound
        with torch.no_grad():
            down.weight.copy_(values)
        adapters[name] = Adapter(wrapped.base_layer.weight, down.weight, up.weight, wrapped.scaling[ADAPTER])
    for part in module.modules():
        if isinstance(part, _FactorPair):
            part.basis = found.get(id(_plain(part.basis).weight), part.basis)
    module.train(model.training)
    return AdaptedTwin(module, adapters)


def attach(model: PreTrainedModel, adapted: AdaptedTwin, *, rank: int, alpha: float) -> None:
    """Attaches trained adapters to the compressed model itself, in place; layers of a shared basis hold the same one.

    Side effect: `requires_grad` of the model's parameters changes.
    """
    by_factor = {id(adapter.factor): adapter for adapter in adapted.adapters.values()}
    ranks = {
        f"{name}.{kind}": by_factor[id(getattr(layer, kind))].rank
        for name, layer in model.named_modules()
        if isinstance(layer, FactorisedLinear)
        for kind in KINDS
        if id(getattr(layer, kind)) in by_factor
    }
    config = _config(rank, alpha, ranks, target_modules=[], target_parameters=list(ranks))
    with warnings.catch_warnings():
        # peft applies these patterns to Parameters too, but looks among modules only for what they match, and warns.
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for wrapper in model.modules():
        if isinstance(wrapper, ParamWrapper):
            adapter = by_factor[id(getattr(wrapper.get_base_layer(), wrapper.parameter_name))]
            for part, value in ((wrapper.lora_A, adapter.down), (wrapper.lora_B, adapter.up)):
                part[ADAPTER].weight = value
    model.train(model.training)
    config.inference_mode = True


def has_adapters(model: nn.Module) -> bool:
    """Whether adapters are attached to the model."""
    return any(isinstance(layer, BaseTunerLayer) for layer in model.modules())


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """The model without adapters: a twin that shares all its parameters, or the model itself if it has none."""
    if not has_adapters(model):
        return model
    bare = twin(model)
    for name, layer in list(bare.named_modules()):
        if isinstance(layer, BaseTunerLayer) and not _inside_adapter(name):
            bare.set_submodule(name, layer.get_base_layer())
    del bare.peft_config
    return bare


def save_adapters(model: PreTrainedModel, folder: Path) -> None:
    """Writes the adapters as a peft folder; peft does not know sharing, so a shared one is written once per layer.

    Adapters of a smaller rank are listed in `rank_pattern` and `alpha_pattern`. On loading, peft applies these to
    Parameters, but warns that they match no module.
    """
    config: Any = model.peft_config
    config[ADAPTER].save_pretrained(folder)
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["target_parameters"] = sorted(settings["target_parameters"])
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    stored = {f"{_PREFIX}{name}": value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors", {"format": "pt"})


def _config(rank: int, alpha: float, ranks: Mapping[str, int], **settings: Any) -> LoraConfig:
    """The settings of adapters with these `ranks` by name, none above `rank`, all scaled by `alpha / rank`."""
    clipped = {re.escape(name): own for name, own in ranks.items() if own < rank}
    scale: Any = alpha  # peft's type says int, and its code takes any number
    scales: Any = {name: alpha * own / rank for name, own in clipped.items()}
    return LoraConfig(r=rank, lora_alpha=scale, rank_pattern=clipped, alpha_pattern=scales, **settings)


class _FactorPair(nn.Module):
    """A factorised layer as two `nn.Linear` that hold its Parameters; a shared basis is one module, too."""

    basis: nn.Module

    def __init__(self, layer: FactorisedLinear, linears: dict[int, nn.Linear]) -> None:
        super().__init__()
        self.basis = linears.setdefault(id(layer.basis), _linear(layer.basis))
        self.weight = _linear(layer.weight)
        self.register_parameter("bias", layer.any_bias)
        self._through = layer.through  # a bound method, not a module: the parameters are registered above
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        return self._through(x, self.basis, self.weight)


def _linear(factor: nn.Parameter) -> nn.Linear:
    with torch.device("meta"):  # no memory and no random numbers for a weight that is replaced at once
        linear = nn.Linear(factor.shape[1], factor.shape[0], bias=False)
    linear.weight = factor
    return linear


def _plain(layer: nn.Module) -> Any:
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _factor_id(module: nn.Module) -> int | None:
    return id(module.weight) if type(module) is nn.Linear else None


def _inside_adapter(name: str) -> bool:
    return "base_layer" in name.split(".")
