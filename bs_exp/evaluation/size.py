"""The size of a compressed model against its dense original."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from bs_exp.models.modeling_basis_sharing import BIASES, Quantized
from bs_exp.types import CompressedModel, LoadedModel, RankPlan


def measure_size(dense: LoadedModel, compressed: LoadedModel | CompressedModel, plan: RankPlan) -> dict[str, float]:
    """Parameters, bytes and retained shares, counted on the models themselves; a tensor used twice counts once.

    `retain_ratio` is the share kept of the matrices that the plan targets (biases not counted), `model_retain_ratio`
    that of all parameters: numbers, whatever bits they have. `bytes` is what the tensors of a saved model take, its
    tokenizer and headers not counted: of matrices in few bits the packed numbers, scales and zero points. So is
    `targeted_bytes`, for the matrices that the plan targets, with what their layout keeps beside factors, such as
    pivots; biases are not counted in it.
    """
    positions = dense.architecture.by_position
    targets = [positions[g.group.matrix, layer].module for g in plan.groups for layer in g.group.layers]
    dense_targeted = _numbers(dense.module, _weights(dense.module, targets))
    targeted = _numbers(compressed.module, _weights(compressed.module, targets))
    dense_parameters = _numbers(dense.module, dense.module.parameters())
    parameters = _numbers(compressed.module, compressed.module.parameters())
    return {
        "retain_ratio": targeted / dense_targeted,
        "model_retain_ratio": parameters / dense_parameters,
        "targeted_parameters": targeted,
        "dense_targeted_parameters": dense_targeted,
        "parameters": parameters,
        "dense_parameters": dense_parameters,
        "bytes": stored_bytes(compressed.module),
        "dense_bytes": stored_bytes(dense.module),
        "targeted_bytes": _nbytes(_stored(compressed.module, targets)),
        "dense_targeted_bytes": _nbytes(_stored(dense.module, targets)),
    }


def stored_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and saved buffers, each stored once."""
    # keep_vars: without it every entry is a new tensor, and ties cannot be seen.
    return _nbytes(module.state_dict(keep_vars=True).values())


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in _unique(tensors))


def _stored(module: nn.Module, targets: Iterable[str]) -> Iterator[Tensor]:
    """What the layers of the targets save, besides biases."""
    for target in targets:
        named = module.get_submodule(target).state_dict(keep_vars=True)
        yield from (tensor for name, tensor in named.items() if name.rpartition(".")[2] not in BIASES)


def _weights(module: nn.Module, targets: Iterable[str]) -> Iterator[Tensor]:
    for target in targets:
        named = module.get_submodule(target).named_parameters()
        yield from (parameter for name, parameter in named if name.rpartition(".")[2] not in BIASES)


def _numbers(module: nn.Module, tensors: Iterable[Tensor]) -> int:
    """How many numbers tensors of a model hold; packed ones hold more than they have entries, scales hold none."""
    packed = {id(p): n for part in module.modules() if isinstance(part, Quantized) for p, n in part.numbers().items()}
    return sum(packed.get(id(tensor), tensor.numel()) for tensor in _unique(tensors))


def _unique(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    return {id(tensor): tensor for tensor in tensors}.values()
