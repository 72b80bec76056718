"""Factors into the model: a twin that shares all parameters, and `SharedLinear` in place of its dense matrices."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from itertools import accumulate, chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bs_exp.errors import DecompositionError, ModelError
from bs_exp.hf_plugin import (
    METHOD,
    BasisSharingConfig,
    BasisSharingQuantizer,
    PivotedLinear,
    SharedLinear,
    pack_bits,
)
from bs_exp.models.architecture import module_of
from bs_exp.types import Architecture, PivotedFactors, StoredFactors, WeightGroup

Model = TypeVar("Model", bound=nn.Module)


def twin(model: Model) -> Model:
    """A structural copy that holds the very parameters and buffers of `model`: modules may be replaced in it freely."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def replace_matrices(
    model: PreTrainedModel, architecture: Architecture, factors: Iterable[StoredFactors], *, layout: str = "plain"
) -> None:
    """Put factorised layers in place of the groups' dense layers, in the dtype and on the device of their weights.

    Works in place on a twin of the dense model. Biases stay the same Parameters, and every module outside the given
    groups stays as it is. `factors` is consumed one group at a time; all have the given layout.
    """
    method = _quantization_method(model)
    if method is not None:
        raise ModelError(
            f"This {type(model).__name__} already holds factorised or quantized weights (method {method!r}). "
            "Replace in a fresh twin of the dense model."
        )
    groups = []
    for stored in factors:
        groups.append(_replace_group(model, architecture, stored))
        del stored  # else the fp64 factors would live until the next group's are there
    if groups:
        BasisSharingQuantizer(BasisSharingConfig(groups=groups, layout=layout)).attach(model)


def is_factorised(model: PreTrainedModel) -> bool:
    """Whether some matrices of the model are stored as shared factors."""
    # By name, not by class: a model loaded with `trust_remote_code` holds the classes of its own copy of the plug-in.
    return _quantization_method(model) == METHOD


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """An ordinary dense model with the same products; everything that was not factorised is shared with `model`."""
    if not is_factorised(model):
        raise ModelError(f"This {type(model).__name__} holds no shared factors, so there is nothing to make dense.")
    dense: PreTrainedModel = twin(model).dequantize()
    return dense


def _quantization_method(model: PreTrainedModel) -> str | None:
    """Name of the plug-in that loads the model's weights; None for an ordinary model, which lacks the attribute."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    return None if quantizer is None else str(quantizer.quantization_config.quant_method)


def _replace_group(model: PreTrainedModel, architecture: Architecture, stored: StoredFactors) -> Mapping[str, Any]:
    """Replaces the matrices of a group; returns its entry in the quantization config."""
    group = stored.group
    matrices = [architecture.by_position[group.matrix, layer] for layer in group.layers]
    dense = [module_of(model, matrix) for matrix in matrices]
    _check_shapes(stored)
    basis = _parameter(stored.basis, like=dense[0].weight, group=group, what="basis")
    entry: dict[str, Any] = {"members": [matrix.module for matrix in matrices], "rank": stored.rank}
    coefficients = [
        _parameter(
            stored.coefficients[matrix.layer],
            like=old.weight,
            group=group,
            what=f"coefficients of layer {matrix.layer}",
        )
        for matrix, old in zip(matrices, dense, strict=True)
    ]
    layers: list[nn.Module] = []
    if isinstance(stored, PivotedFactors):
        counts = [int(stored.pivots[layer].sum()) for layer in group.layers]
        entry["pivots"] = counts
        for matrix, old, own, count, end in zip(matrices, dense, coefficients, counts, accumulate(counts), strict=True):
            bits = pack_bits(stored.pivots[matrix.layer].to(old.weight.device))
            layers.append(PivotedLinear.replacing(old, basis, own, bits, start=end - count, count=count))
    else:
        layers += [SharedLinear.replacing(old, basis, own) for old, own in zip(dense, coefficients, strict=True)]
    for matrix, new in zip(matrices, layers, strict=True):
        model.set_submodule(matrix.module, new)
    return entry


def _check_shapes(stored: StoredFactors) -> None:
    group, rank = stored.group, stored.rank
    widths = {layer: group.d_out for layer in group.layers}
    if isinstance(stored, PivotedFactors):
        widths = {layer: group.d_out - int(pivots.sum()) for layer, pivots in stored.pivots.items()}
    found = (stored.basis.shape[0], {layer: tuple(c.shape) for layer, c in stored.coefficients.items()})
    needed = (group.d_in, {layer: (rank, width) for layer, width in widths.items()})
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
