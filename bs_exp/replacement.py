"""Factors into the model: a twin that shares all parameters, and `SharedLinear` in place of its dense matrices."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bs_exp.errors import DecompositionError, ModelError
from bs_exp.hf_plugin import METHOD, BasisSharingConfig, BasisSharingQuantizer, SharedLinear
from bs_exp.models.architecture import module_of
from bs_exp.types import Architecture, SharedFactors, WeightGroup

Model = TypeVar("Model", bound=nn.Module)


def twin(model: Model) -> Model:
    """A structural copy that holds the very parameters and buffers of `model`: modules may be replaced in it freely."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def replace_matrices(model: PreTrainedModel, architecture: Architecture, factors: Iterable[SharedFactors]) -> None:
    """Put `SharedLinear` layers in place of the groups' dense layers, in the dtype and on the device of their weights.

    Works in place on a twin of the dense model. Biases stay the same Parameters, and every module outside the given
    groups stays as it is. `factors` is consumed one group at a time.
    """
    method = _quantization_method(model)
    if method is not None:
        raise ModelError(
            f"This {type(model).__name__} already holds factorised or quantized weights (method {method!r}). "
            "Replace in a fresh twin of the dense model."
        )
    groups = []
    for shared in factors:
        groups.append(_replace_group(model, architecture, shared))
        del shared  # else the fp64 factors would live until the next group's are there
    if groups:
        BasisSharingQuantizer(BasisSharingConfig(groups=groups)).attach(model)


def is_factorised(model: PreTrainedModel) -> bool:
    """Whether some matrices of the model are stored as shared factors."""
    # By name, not by class: a model loaded with `trust_remote_code` holds the classes of its own copy of the plug-in.
    return _quantization_method(model) == METHOD


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """An ordinary dense model with the same products; everything that was not factorised is shared with `model`."""
    if not is_factorised(model):
        raise ModelError(f"This {type(model).__name__} holds no shared factors, so there is nothing to make dense.")
    dense: PreTrainedModel = twin(model).dequantize()  # type: ignore[no-untyped-call]
    return dense


def _quantization_method(model: PreTrainedModel) -> str | None:
    """Name of the plug-in that loads the model's weights; None for an ordinary model, which lacks the attribute."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    return None if quantizer is None else str(quantizer.quantization_config.quant_method)


def _replace_group(model: PreTrainedModel, architecture: Architecture, shared: SharedFactors) -> Mapping[str, Any]:
    group = shared.group
    matrices = [architecture.by_position[group.matrix, layer] for layer in group.layers]
    weights = [module_of(model, matrix).weight for matrix in matrices]
    _check_shapes(shared)
    basis = _parameter(shared.basis, like=weights[0], group=group, what="basis")
    for matrix, weight in zip(matrices, weights, strict=True):
        coefficients = _parameter(
            shared.coefficients[matrix.layer], like=weight, group=group, what=f"coefficients of layer {matrix.layer}"
        )
        layer = SharedLinear.replacing(module_of(model, matrix), basis, coefficients)
        model.set_submodule(matrix.module, layer)
    return {"members": [matrix.module for matrix in matrices], "rank": shared.rank}


def _check_shapes(shared: SharedFactors) -> None:
    group, rank = shared.group, shared.rank
    found = (shared.basis.shape[0], {layer: tuple(c.shape) for layer, c in shared.coefficients.items()})
    needed = (group.d_in, {layer: (rank, group.d_out) for layer in group.layers})
    if found != needed:
        raise DecompositionError(
            f"The factors of group {group.name} do not fit it: rows of the basis, and shapes of the coefficients by "
            f"layer, are {found}, needed are {needed}."
        )


def _parameter(factor: Tensor, *, like: Tensor, group: WeightGroup, what: str) -> nn.Parameter:
    """A factor `[in, out]` as a Parameter `[out, in]` in the dtype and on the device of the weight it replaces."""
    if like.is_meta:
        raise ModelError(
            f"The weights of group {group.name} are not in memory (offloaded or on the meta device), so they cannot be "
            "replaced. Load the model onto one device."
        )
    stored = factor.T.to(device=like.device, dtype=like.dtype, memory_format=torch.contiguous_format)
    if not stored.isfinite().all():
        if not factor.isfinite().all():
            raise DecompositionError(f"The {what} of group {group.name}: NaN or infinite values in the factors.")
        raise DecompositionError(
            f"The {what} of group {group.name}: values up to {factor.abs().max().item():.3g} do not fit into "
            f"{like.dtype}, which ends at {torch.finfo(like.dtype).max:.3g}. Load the model in bfloat16 or float32."
        )
    return nn.Parameter(stored, requires_grad=like.requires_grad)
