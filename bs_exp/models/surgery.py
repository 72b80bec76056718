"""Factors into the model: a twin that shares all parameters, and `SharedLinear` in place of its dense matrices."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bs_exp.errors import CacheError, DecompositionError, ModelError
from bs_exp.models.architecture import module_of
from bs_exp.models.mapped import is_mapped, write_tensors
from bs_exp.models.modeling_basis_sharing import (
    LAYOUTS,
    METHOD,
    BasisSharingConfig,
    BasisSharingQuantizer,
    CorrectedLinear,
    FactorisedLinear,
    SplitLinear,
    UnfusedExperts,
    canonical,
    kept_of,
    share_basis,
)
from bs_exp.protocols import Layout, StoredFactors
from bs_exp.types import Architecture, SharedFactors, WeightGroup

Model = TypeVar("Model", bound=nn.Module)


def twin(model: Model) -> Model:
    """A structural copy that holds the very parameters and buffers of `model`: modules may be replaced in it freely."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def replace_matrices(
    model: PreTrainedModel,
    architecture: Architecture,
    factors: Iterable[SharedFactors],
    layout: Layout,
    folder: Path | None = None,
) -> None:
    """Put factorised layers in place of the groups' dense layers, in the dtype and on the device of their weights.

    Works in place on a twin of the dense model. Biases stay the same Parameters, and every module outside the given
    groups stays as it is. `factors` is consumed one group at a time; all are stored in the given layout. Where the
    weights lie in files, so do the factors, in files without names in `folder`.
    """
    method = _quantization_method(model)
    if method is not None:
        raise ModelError(
            f"This {type(model).__name__} already holds factorised or quantized weights (method {method!r}). "
            "Replace in a fresh twin of the dense model."
        )
    groups = []
    for shared in factors:
        groups.append(_replace_group(model, architecture, layout.arrange(shared), folder))
        del shared  # else the fp64 factors would live until the next group's are there
    splits, experts = _own_splits(model), _own_experts(model)
    if groups or splits or experts:
        config = BasisSharingConfig(groups=groups, layout=layout.name, splits=splits, experts=experts)
        quantizer = BasisSharingQuantizer(config)
        quantizer.arranged_by = layout
        quantizer.attach(model)


def factors_of(
    model: PreTrainedModel, architecture: Architecture, group: WeightGroup, layout: Layout | None = None
) -> StoredFactors:
    """The factors of a group as the model holds them: views, in its dtype and on its device.

    A model that was read from a folder knows its layout by name alone: then `layout` must be given.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    layout = layout or getattr(quantizer, "arranged_by", None)
    kept: Mapping[str, Tensor] = {}
    coefficients: dict[int, Tensor] = {}
    corrections: dict[int, tuple[Tensor, Tensor]] = {}
    basis = None
    for matrix in (architecture.by_position[group.matrix, layer] for layer in group.layers):
        module = model.get_submodule(matrix.module)
        if isinstance(module, CorrectedLinear):
            corrections[matrix.place] = (module.down.detach().T, module.weight.detach().T)
            module = module.shared
        if not isinstance(module, FactorisedLinear):
            raise ModelError(f"{matrix.module} is a {type(module).__name__}, not stored as factors of {group.name}.")
        basis, kept = module.basis.detach().T, kept_of(module)
        coefficients[matrix.place] = module.weight.detach().T
    assert basis is not None
    if layout is None:
        raise ModelError(
            f"This {type(model).__name__} was read from a folder, which names its layout "
            f"({quantizer.quantization_config.layout!r}) and no more. Give factors_of the layout itself."
        )
    return StoredFactors(layout, group, basis, coefficients, kept, corrections)


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


def block_parameters(model: PreTrainedModel, path: str) -> dict[str, nn.Parameter]:
    """The parameters that the module at this path holds alone, by name: no other block shares them."""
    inside = dict(model.get_submodule(path).named_parameters(prefix=path))
    whole = Counter(parameter for module in model.modules() for parameter in module._parameters.values())
    own = Counter(p for module in model.get_submodule(path).modules() for p in module._parameters.values())
    return {name: p for name, p in inside.items() if p.numel() and own[p] == whole[p]}


def own_parameters(
    model: PreTrainedModel, dense: PreTrainedModel, path: str, folder: Path | None = None
) -> list[nn.Parameter]:
    """Copies, in the module at this path, of the parameters that it shares with the dense model and nobody else.

    Returns them. Those that lie in files have copies in a file without a name in `folder`.
    """
    others = set(dense.parameters())
    shared = [parameter for parameter in block_parameters(model, path).values() if parameter in others]
    copies = {parameter: nn.Parameter(parameter.detach().clone(), parameter.requires_grad) for parameter in shared}
    _to_files((copies[parameter] for parameter in shared if is_mapped(parameter)), folder)
    for module in model.get_submodule(path).modules():
        for name, parameter in module._parameters.items():
            if parameter in copies:
                module.register_parameter(name, copies[parameter])
    return list(copies.values())


def exchange_factors(
    model: PreTrainedModel, architecture: Architecture, factors: StoredFactors, folder: Path | None = None
) -> None:
    """Puts other factors in place of a group's, in new Parameters, of the same rank and in the same layout.

    Biases stay the Parameters they are. In place of factors that lie in files come some in files without names in
    `folder`. DecompositionError if the rank is another.
    """
    group = factors.group
    matrices = [architecture.by_position[group.matrix, layer] for layer in group.layers]
    present = [model.get_submodule(matrix.module) for matrix in matrices]
    shared = [cast("FactorisedLinear", x.shared if isinstance(x, CorrectedLinear) else x) for x in present]
    for matrix, outer, layer in zip(matrices, present, shared, strict=True):
        corrected = isinstance(outer, CorrectedLinear) == (group.correction > 0)
        if not corrected or not isinstance(layer, FactorisedLinear) or not layer.weight.is_floating_point():
            raise ModelError(
                f"{matrix.module} is a {type(outer).__name__}, whose factors cannot be exchanged for those of "
                f"{group.name} (correction={group.correction})."
            )
    _check_shapes(factors, type(shared[0]))
    if factors.rank != shared[0].rank:
        raise DecompositionError(
            f"The factors of group {group.name} have rank {factors.rank}, those in the model {shared[0].rank}."
        )
    in_files = any(is_mapped(weight) for layer in present for weight in layer.parameters())
    basis = _parameter(factors.basis, like=shared[0].basis, group=group, what="basis")
    own, terms = {}, {}
    for matrix, layer in zip(matrices, shared, strict=True):
        place = matrix.place
        what = f"coefficients of layer {place}"
        own[place] = _parameter(factors.coefficients[place], like=layer.weight, group=group, what=what)
        if group.correction:
            terms[place] = _correction(factors, place, like=layer.weight)
    # Nothing fails from here on: a group whose layers hold factors of two kinds would compute nonsense.
    for matrix, outer, layer in zip(matrices, present, shared, strict=True):
        layer.basis, layer.weight = basis, own[matrix.place]
        for name, value in factors.kept.items():
            setattr(layer, name, canonical(value.to(basis.device)))
        layer.refresh()
        if isinstance(outer, CorrectedLinear):
            outer.down, outer.weight = terms[matrix.place]
    if in_files:
        _to_files({factor for layer in present for factor in layer.parameters()}, folder)


def is_factorised(model: PreTrainedModel) -> bool:
    """Whether some matrices of the model are stored as shared factors."""
    # By name, not by class: a model loaded with `trust_remote_code` holds the classes of its own copy of the plug-in.
    return _quantization_method(model) == METHOD


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """An ordinary dense model with the same products; everything that was not factorised is shared with `model`."""
    if not is_factorised(model):
        raise ModelError(f"This {type(model).__name__} holds no shared factors, so there is nothing to make dense.")
    if "peft_config" in vars(model):
        raise ModelError(
            f"This {type(model).__name__} carries adapters beside its factors. Merge them (update.merge=true), or load "
            "the saved model without its adapter folder."
        )
    dense: PreTrainedModel = twin(model).dequantize()
    return dense


def _quantization_method(model: PreTrainedModel) -> str | None:
    """Name of the plug-in that loads the model's weights; None for an ordinary model, which lacks the attribute."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    return None if quantizer is None else str(quantizer.quantization_config.quant_method)


def _replace_group(
    model: PreTrainedModel,
    architecture: Architecture,
    stored: StoredFactors,
    folder: Path | None,
) -> Mapping[str, Any]:
    """Replaces the matrices of a group; returns its entry in the quantization config.

    The factors go to files if the matrices are there.
    """
    group = stored.group
    matrices = [architecture.by_position[group.matrix, layer] for layer in group.layers]
    dense = [module_of(model, matrix) for matrix in matrices]
    kind = LAYOUTS[stored.layout.name](group.size)
    _check_shapes(stored, kind)
    basis = _parameter(stored.basis, like=dense[0].weight, group=group, what="basis")
    entry: dict[str, Any] = {"members": [matrix.module for matrix in matrices], "rank": stored.rank}
    layers: list[Any] = []
    for matrix, old in zip(matrices, dense, strict=True):
        what = f"coefficients of layer {matrix.place}"
        own = _parameter(stored.coefficients[matrix.place], like=old.weight, group=group, what=what)
        kept = {name: canonical(value.to(old.weight.device)) for name, value in stored.kept.items()}
        layers.append(kind.replacing(old, basis, own, **kept))
    share_basis(layers)
    if group.correction:
        entry["correction"] = group.correction
        layers = [_corrected(new, stored, matrix.place) for matrix, new in zip(matrices, layers, strict=True)]
    if any(is_mapped(old.weight) for old in dense):
        _to_files({factor for layer in layers for factor in layer.parameters()}, folder)
    for matrix, new in zip(matrices, layers, strict=True):
        model.set_submodule(matrix.module, new)
    return entry


def _to_files(factors: Iterable[nn.Parameter], folder: Path | None) -> None:
    """Factors that are in memory go to a file, biases that lie in one stay there."""
    moved = [factor for factor in factors if not is_mapped(factor)]
    try:
        copies = write_tensors([factor.data for factor in moved], folder)
    except OSError as error:
        raise CacheError(
            f"Cannot write the factors of a group to {folder or 'the temporary folder'}: {error}. With "
            "model.offload=disk the compressed model waits there. Free some space, or set cache.dir to a larger disk."
        ) from error
    for factor, stored in zip(moved, copies, strict=True):
        factor.data = stored


def _own_splits(model: PreTrainedModel) -> list[Mapping[str, Any]]:
    """Layers in blocks no longer hold views of the dense model's weights; their entries in the quantization config."""
    entries: list[Mapping[str, Any]] = []
    for name, layer in model.named_modules():
        if isinstance(layer, SplitLinear):
            layer.own()
            entries.append({"module": name, "axis": layer.axis, "sizes": list(layer.sizes)})
    return entries


def _own_experts(model: PreTrainedModel) -> list[str]:
    """Layers of experts no longer hold views of the dense model's weights; the paths of modules of experts."""
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, UnfusedExperts)}
    for experts in found.values():
        experts.own()
    return list(found)


def _corrected(shared: FactorisedLinear, stored: StoredFactors, layer: int) -> CorrectedLinear:
    return CorrectedLinear(shared, *_correction(stored, layer, like=shared.weight))


def _correction(stored: StoredFactors, layer: int, *, like: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    what = f"correction of layer {layer}"
    down, own = (_parameter(f, like=like, group=stored.group, what=what) for f in stored.corrections[layer])
    return down, own


def _check_shapes(stored: StoredFactors, kind: type[FactorisedLinear]) -> None:
    group, rank = stored.group, stored.rank
    corrections = {layer: (down.shape[1], own.shape[0]) for layer, (down, own) in stored.corrections.items()}
    if corrections != ({layer: (group.correction,) * 2 for layer in group.layers} if group.correction else {}):
        raise DecompositionError(
            f"The factors of group {group.name} have corrections of the ranks {corrections} by layer, needed is "
            f"{group.correction} for each of {list(group.layers)}."
        )
    try:
        shapes = kind.shapes(group.d_in, group.d_out, rank)
    except ValueError as error:
        raise DecompositionError(f"The factors of group {group.name} do not fit it: {error}.") from error
    found = (stored.basis.shape[0], {layer: tuple(c.shape) for layer, c in stored.coefficients.items()})
    needed = (shapes.basis[1], {layer: (shapes.weight[1], shapes.weight[0]) for layer in group.layers})
    if found != needed:
        raise DecompositionError(
            f"The factors of group {group.name} do not fit it: rows of the basis, and shapes of the coefficients by "
            f"layer, are {found}, needed are {needed}."
        )
    kept = {name: (tuple(value.shape), value.dtype) for name, value in stored.kept.items()}
    if kept != shapes.kept:
        raise DecompositionError(
            f"What the layout {stored.layout.name!r} keeps for group {group.name} beside its factors does not fit: "
            f"shapes and dtypes are {kept}, needed are {shapes.kept}."
        )


def _parameter(factor: Tensor, *, like: Tensor, group: WeightGroup, what: str) -> nn.Parameter:
    """A factor `[in, out]` as a Parameter `[out, in]` in the dtype and on the device of the weight it replaces."""
    if like.is_meta:
        raise ModelError(
            f"The weights of group {group.name} are not in memory (offloaded or on the meta device), so they cannot be "
            "replaced. Load the model onto one device."
        )
    stored = canonical(factor.T.to(device=like.device, dtype=like.dtype))
    if not stored.isfinite().all():
        if not factor.isfinite().all():
            raise DecompositionError(f"The {what} of group {group.name}: NaN or infinite values in the factors.")
        raise DecompositionError(
            f"The {what} of group {group.name}: values up to {factor.abs().max().item():.3g} do not fit into "
            f"{like.dtype}, which ends at {torch.finfo(like.dtype).max:.3g}. Load the model in bfloat16 or float32."
        )
    return nn.Parameter(stored, requires_grad=like.requires_grad)
