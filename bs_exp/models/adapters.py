"""LoRA adapters of factors (peft): one for each factor, so that layers which share a basis share its adapter too.

They are put in place of the maps by which factorised layers apply their factors (`FactorMap`). The layers of a group
hold one such module for their basis, so peft finds it once, and merges its adapter once. They are trained on a twin;
adapters that are kept are attached to the model itself, in the form that `PeftModel.from_pretrained` loads.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from bs_exp.models.modeling_basis_sharing import FactorMap
from bs_exp.models.surgery import twin

ADAPTER = "default"
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
    places = _places(module, wanted)
    ranks = {place: min(rank, *factor.shape) for place, factor in places.items()}
    _inject(module, _config(rank, alpha, ranks, lora_dropout=dropout))
    found = {id(factor): module.get_submodule(place) for place, factor in places.items()}
    generator = torch.Generator().manual_seed(seed)
    adapters: dict[str, Adapter] = {}
    for key, name in sorted(wanted.items(), key=lambda item: item[1]):
        wrapped: Any = found[key]
        factor = wrapped.get_base_layer().weight
        dtype = torch.promote_types(factor.dtype, torch.float32)
        down, up = wrapped.lora_A[ADAPTER].to(dtype), wrapped.lora_B[ADAPTER].to(dtype)
        bound = 1.0 / math.sqrt(down.in_features)
        values = torch.rand(down.weight.shape, generator=generator, dtype=torch.float64) * 2.0 * bound - bound
        with torch.no_grad():
            down.weight.copy_(values)
        adapters[name] = Adapter(factor, down.weight, up.weight, wrapped.scaling[ADAPTER])
    module.train(model.training)
    return AdaptedTwin(module, adapters)


def attach(model: PreTrainedModel, adapted: AdaptedTwin, *, rank: int, alpha: float) -> None:
    """Attaches trained adapters to the compressed model itself, in place; a shared basis has one, as in training.

    Side effect: `requires_grad` of the model's parameters changes.
    """
    by_factor = {id(adapter.factor): adapter for adapter in adapted.adapters.values()}
    places = _places(model, by_factor)
    config = _config(rank, alpha, {place: by_factor[id(factor)].rank for place, factor in places.items()})
    _inject(model, config)
    for place, factor in places.items():
        wrapped: Any = model.get_submodule(place)
        adapter = by_factor[id(factor)]
        wrapped.lora_A[ADAPTER].weight, wrapped.lora_B[ADAPTER].weight = adapter.down, adapter.up
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
    """Writes the adapters as a peft folder; that of a shared basis is written once."""
    config: Any = model.peft_config
    config[ADAPTER].save_pretrained(folder)
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["target_modules"] = sorted(settings["target_modules"])
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    stored = {f"{_PREFIX}{name}": value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors", {"format": "pt"})


def _config(rank: int, alpha: float, ranks: Mapping[str, int], **settings: Any) -> LoraConfig:
    """The settings of adapters with these `ranks` by place, none above `rank`, all scaled by `alpha / rank`."""
    clipped = {re.escape(place): own for place, own in ranks.items() if own < rank}
    scale: Any = alpha  # peft's type says int, and its code takes any number
    scales: Any = {place: alpha * own / rank for place, own in clipped.items()}
    return LoraConfig(
        r=rank, lora_alpha=scale, rank_pattern=clipped, alpha_pattern=scales, target_modules=list(ranks), **settings
    )


def _inject(model: PreTrainedModel, config: LoraConfig) -> None:
    places = config.target_modules
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    config.target_modules = places  # peft shortens the names to endings that other modules could have, too


def _places(model: nn.Module, factors: Container[int]) -> dict[str, nn.Parameter]:
    """Names of the modules that stand for the factors with these ids, and the factors; of a shared basis the first."""
    maps = ((name, part) for name, part in model.named_modules() if isinstance(part, FactorMap))
    return {name: part.weight for name, part in maps if id(part.weight) in factors}


def _inside_adapter(name: str) -> bool:
    return "base_layer" in name.split(".")
