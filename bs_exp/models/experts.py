"""Routed experts taken apart: a twin of the model in which every matrix of every expert is a linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from bs_exp.cache import content_key
from bs_exp.errors import ModelError
from bs_exp.models.architecture import read_roles
from bs_exp.models.modeling_basis_sharing import UnfusedExperts
from bs_exp.models.surgery import twin
from bs_exp.types import LoadedModel, WeightMatrix

# The layers of an expert, and their matrix types.
PARTS = {"gate_layer": "expert_gate", "up_layer": "expert_up", "down_layer": "expert_down"}
# Two ways to compute the same in the model's dtype; another way to route or to gate is far off.
_TOLERANCE = 1e-2


def unfused(dense: LoadedModel) -> LoadedModel:
    """A twin whose `fused` modules are `UnfusedExperts`, with views of the same weights; `dense` itself without any.

    A matrix has the expert's number beside its layer, and its input site that number in its name, since every expert
    reads other tokens. Raises ModelError if a module computes something else than its experts do one by one.
    """
    if not dense.architecture.fused:
        return dense
    module, architecture = twin(dense.module), dense.architecture
    matrices = list(architecture.matrices)
    checked: set[type[nn.Module]] = set()
    for path in architecture.fused:
        fused = module.get_submodule(path)
        apart = UnfusedExperts.unfusing(fused)
        if type(fused) not in checked:
            _check(fused, apart, path)
            checked.add(type(fused))
        module.set_submodule(path, apart)
        layer = next(i for i, block in enumerate(architecture.blocks) if path.startswith(f"{block}."))
        stack = next((m.stack for m in architecture.matrices if m.layer == layer), 0)
        matrices += _matrices(apart, path, layer, stack)
    order = {matrix: position for position, matrix in enumerate(read_roles().sites)}
    tensors = {
        f"{path}.{name}"
        for path in architecture.fused
        for name, _ in dense.module.get_submodule(path).named_parameters()
    }
    return replace(
        dense,
        module=module,
        architecture=replace(
            architecture,
            matrices=tuple(sorted(matrices, key=lambda m: (m.layer, order[m.matrix], m.place))),
            untouched=tuple(name for name in architecture.untouched if name not in tensors),
            fused=(),
        ),
        provenance=_provenance(dense),
    )


def _provenance(dense: LoadedModel) -> dict[str, Any]:
    provenance = dict(dense.provenance)
    if "fingerprint" in provenance:  # shapes without values have none
        provenance["fingerprint"] = content_key(model=dense.fingerprint, unfused=list(dense.architecture.fused))
    return provenance


def _matrices(apart: UnfusedExperts, path: str, layer: int, stack: int) -> Iterator[WeightMatrix]:
    sites = read_roles().sites
    for expert, member in enumerate(apart.members):
        for name, matrix in PARTS.items():
            linear = cast("nn.Linear", member.get_submodule(name))
            yield WeightMatrix(
                matrix=matrix,
                layer=layer,
                site=f"{sites[matrix]}.{expert}",
                module=f"{path}.members.{expert}.{name}",
                d_in=linear.in_features,
                d_out=linear.out_features,
                stack=stack,
                expert=expert,
            )


@torch.no_grad()
def _check(fused: nn.Module, apart: UnfusedExperts, path: str) -> None:
    """ModelError unless both compute the same of a few random tokens, which the first and the last expert read."""
    weight = apart.members[0].get_submodule("gate_layer").weight
    assert isinstance(weight, torch.Tensor)
    if weight.is_meta or not _has_values(weight):
        return
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, weight.shape[1], generator=generator).to(weight)
    shares = torch.rand(4, 1, generator=generator).to(weight)
    chosen = torch.tensor([[0], [len(apart.members) - 1]] * 2, device=weight.device)
    # The code of the class itself, in place of a kernel that the configuration names.
    eager: Any = getattr(type(fused).forward, "__wrapped__", type(fused).forward)
    wanted, found = eager(fused, states, chosen, shares), apart(states, chosen, shares)
    if not (wanted - found).norm() <= _TOLERANCE * wanted.norm():
        raise ModelError(
            f"{path} ({type(fused).__name__}) computes something else than its experts do one by one "
            f"(outputs differ by {float((wanted - found).norm() / wanted.norm()):.2g}), so they cannot be compressed. "
            "Leave them dense: model.roles={experts: dense}."
        )


def _has_values(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter)
