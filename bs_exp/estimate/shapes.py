"""A model whose tensors hold no values: a copy of the modules, on the devices where the weights of a run would be."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from bs_exp.estimate.ledger import Ledger
from bs_exp.models.mapped import is_mapped
from bs_exp.models.modeling_basis_sharing import UnfusedExperts, can_unfuse
from bs_exp.models.offload import is_offloaded, place
from bs_exp.models.surgery import twin
from bs_exp.types import ExpertPlace, LoadedModel, WeightGroup, block_of


def without_values(model: LoadedModel, ledger: Ledger, *, device: torch.device, offload: str) -> LoadedModel:
    """The model with tensors of the ledger in place of its own: of a loaded one, or of one on the meta device.

    `device` is the one on which it runs, `offload` where the weights of its blocks wait meanwhile.
    """
    home = device if offload == "none" else torch.device("cpu")
    with ledger.fake:
        memo: dict[int, Any] = {id(tensor): _like(tensor, home) for tensor in _tensors(model.module)}
        module = copy.deepcopy(model.module, memo)
        if offload != "none" and not is_offloaded(module):
            place(module, model.architecture.blocks, device)
    return replace(model, module=module)


def share_out_tokens(module: nn.Module) -> None:
    """Has experts read as many tokens each, since there are no values that say which; in place."""
    # Those that stay dense too: a kernel for all of them wants to know how many tokens each of them has.
    for path, fused in [(path, part) for path, part in module.named_modules() if can_unfuse(part)]:
        module.set_submodule(path, UnfusedExperts.unfusing(fused))
    for experts in module.modules():
        if isinstance(experts, UnfusedExperts):
            experts.evenly = True


def offload_of(model: LoadedModel) -> str:
    """The setting `model.offload` with which a model was loaded."""
    if not is_offloaded(model.module):
        return "none"
    return "disk" if any(is_mapped(weight) for weight in model.module.parameters()) else "cpu"


def nbytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in _tensors(module)}.values())


def _tensors(module: nn.Module) -> chain[Tensor]:
    return chain(module.parameters(), module.buffers())


def _like(tensor: Tensor, device: torch.device) -> Tensor:
    made = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def first_blocks(model: LoadedModel, count: int) -> LoadedModel:
    """The model with its first blocks alone; the others are taken out of a copy of its modules."""
    module = twin(model.module)
    kept = model.architecture.blocks[:count]
    blocks = module.get_submodule(kept[0].rpartition(".")[0])
    assert isinstance(blocks, nn.ModuleList)
    del blocks[count:]
    matrices = tuple(matrix for matrix in model.architecture.matrices if matrix.layer < count)
    return replace(model, module=module, architecture=replace(model.architecture, matrices=matrices, blocks=kept))


def repeated(model: LoadedModel, groups: Sequence[WeightGroup]) -> int | None:
    """The least number of blocks that are repeated through the whole model, with the groups of their matrices; None if
    there is none of which four fit into the model."""
    paths = model.architecture.blocks
    if len({path.rpartition(".")[0] for path in paths}) != 1 or len({_kind(model, path) for path in paths}) != 1:
        return None
    for count in range(1, len(paths) // 4 + 1):
        first = [{(g.matrix, g.layers) for g in groups if start <= g.blocks[0] < start + count} for start in (0, count)]
        inside = all(
            block_of(layers[-1]) // count == block_of(layers[0]) // count for both in first for _, layers in both
        )
        if inside and {(m, tuple(_further(layer, count) for layer in layers)) for m, layers in first[0]} == first[1]:
            return count
    return None


def _further(place: int, blocks: int) -> int:
    """The same place some blocks later."""
    return ExpertPlace(place.layer + blocks, place.expert) if isinstance(place, ExpertPlace) else place + blocks


def _kind(model: LoadedModel, path: str) -> tuple[tuple[str, torch.Size, torch.dtype], ...]:
    block = model.module.get_submodule(path)
    return tuple((name, weight.shape, weight.dtype) for name, weight in block.named_parameters())
