"""Matrices of a model put into few bits: the factors of groups, and layers that are not factorised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bs_exp.errors import ModelError
from bs_exp.linalg.quantization import Grid
from bs_exp.models.modeling_basis_sharing import (
    BasisSharingConfig,
    BasisSharingQuantizer,
    CorrectedLinear,
    FactorisedLinear,
    Packed,
    Precision,
    QuantizedLinear,
    SharedLinear,
    canonical,
    kept_of,
    pack_codes,
    quantized_kind,
)


def packed(codes: UInt8[Tensor, "rows columns"], grid: Grid) -> Packed:
    """Codes of a grid as a layer stores them, on the device of the codes."""
    rows, columns = codes.shape
    zero = None if grid.zero is None else pack_codes(grid.zero, grid.bits)
    return Packed.of(pack_codes(codes, grid.bits), canonical(grid.scale), zero, (rows, columns))


def factorised_layer(model: PreTrainedModel, module: str) -> FactorisedLinear | None:
    """The factorised layer of a matrix, without the correction that may stand beside it; None if it is dense."""
    layer = model.get_submodule(module)
    inner = layer.shared if isinstance(layer, CorrectedLinear) else layer
    return inner if isinstance(inner, FactorisedLinear) else None


def store_factors(model: PreTrainedModel, module: str, basis: Packed, weight: Packed, precision: Precision) -> None:
    """Puts packed factors in place of a layer's; the bias, the layout and a correction stay as they are.

    Layers of a group must be given the same `basis`.
    """
    old = factorised_layer(model, module)
    if old is None:
        raise ModelError(f"{module} is not stored as factors, so these cannot be quantised.")
    kept = {name: canonical(value) for name, value in kept_of(old).items()}
    new = quantized_kind(type(old))(
        basis, weight, old.any_bias, precision=precision, is_conv1d=old.is_conv1d, **kept
    ).train(old.training)
    place = f"{module}.shared" if isinstance(model.get_submodule(module), CorrectedLinear) else module
    model.set_submodule(place, new)


def store_dense(model: PreTrainedModel, module: str, weight: Packed, precision: Precision) -> None:
    """Puts a packed matrix `[out, in]` in place of a dense layer's; the bias stays the Parameter that it is."""
    old = model.get_submodule(module)
    if not isinstance(old, nn.Linear | Conv1D):
        raise ModelError(f"{module} is a {type(old).__name__}, not a dense linear layer, so it cannot be quantised.")
    model.set_submodule(module, QuantizedLinear.replacing(old, weight, precision))


def declare_precision(model: PreTrainedModel, precision: Precision, quantized: Iterable[str], layout: str) -> None:
    """Makes the model, whose matrices were put into few bits, the same as one that `from_pretrained` returns.

    `quantized` are the layers that are not factorised. `layout` is that of a model without factors.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        quantizer = BasisSharingQuantizer(BasisSharingConfig(layout=layout))
    config = quantizer.quantization_config
    config.precision = precision._asdict()
    config.quantized = sorted(quantized)
    quantizer.attach(model)


def read_weight(model: PreTrainedModel, module: str) -> Tensor:
    """The weight `[out, in]` of a dense layer, as a view."""
    layer: Any = model.get_submodule(module)
    weight: Tensor = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


@dataclass(frozen=True, eq=False)
class Reads:
    """What the factors of a layer read, as maps of the layer's inputs, in fp64: the basis `basis`, the weight `weight`.

    `basis` is None where that is the inputs themselves. Which of them it is, and what stands between the factors, is up
    to the layout.
    """

    basis: Float[Tensor, "d_in read"] | None
    weight: Float[Tensor, "d_in rank"]

    def gram_of_basis(self, gram: Float[Tensor, "d_in d_in"]) -> Tensor:
        """The Gram of what the basis reads, from that of the layer's inputs."""
        return gram if self.basis is None else self.basis.mT @ gram @ self.basis

    def gram_of_weight(self, gram: Float[Tensor, "d_in d_in"]) -> Tensor:
        """The Gram of what the weight reads, from that of the layer's inputs."""
        return self.weight.mT @ gram @ self.weight


def reads(layer: FactorisedLinear, basis: Float[Tensor, "rank inputs"]) -> Reads:
    """What the factors of a layer read, with this basis in place of its own: found by having it map all unit inputs."""
    units = torch.eye(layer.in_features, dtype=torch.float64, device=basis.device)
    seen: dict[str, Tensor] = {}

    def first(part: Tensor) -> Tensor:
        seen["basis"] = part
        return part @ basis.mT

    def second(between: Tensor) -> Tensor:
        seen["weight"] = between
        return between.new_zeros(len(between), layer.factor_shape("weight")[0])

    layer.through(units, first, second)
    return Reads(None if seen["basis"] is units else seen["basis"], seen["weight"])


def scales_are_free(layer: FactorisedLinear) -> bool:
    """Whether a component may be scaled in the basis and by the inverse in the weight: not where one is a part of the
    product itself."""
    return isinstance(layer, SharedLinear)
