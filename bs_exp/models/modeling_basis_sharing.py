"""Plug-in through which plain `from_pretrained` of Transformers 5 loads and saves a model with shared bases.

A model is declared as "quantized" by the method `basis_sharing`; its `config.json` lists the groups. Importing this
file registers the method.

The file is complete in itself (torch and transformers only, and built-in errors): saving copies it beside each model
as `modeling_basis_sharing.py`, so that `trust_remote_code=True` loads the model where `bs_exp` is not installed.
It may be imported in the middle of Transformers' own import (bs_exp_autoload.py), so Auto classes are imported where
they are used.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from typing import Self

METHOD = "basis_sharing"
FORMAT_VERSION = 2
REMOTE_MODULE = "modeling_basis_sharing"
# What the bias of a layer can be called: see `FactorisedLinear.bias_name`.
BIASES = ("bias", "output_bias")
# More blocks, and more matrices in them, than any model has: what a configuration says beyond that is not built.
MOST_LAYERS = 10_000
MOST_MODULES = 100_000


LinearMap = Callable[[Tensor], Tensor]

# Products of few tokens and a large factor on a CPU are arranged otherwise: up to so many tokens, from so many numbers
# on. In fp32 in so many blocks; with tiles (AMX) for these numbers of tokens with the factor on the left.
BLOCKS = 8
MOST_TOKENS = 128
LEAST_NUMBERS = 2**20
LEFT_IN_FLOAT32 = range(4, 65)


def linear(x: Tensor, factor: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ factor^T + bias`; for few tokens in inference on a CPU arranged so that all of it works (docs/results.md).

    In blocks of rows, one batch of products: MKL has an entry for one product, which takes a single core on some CPUs,
    and one for a batch, which takes all. From the left, `factor @ x^T`: libraries reorder the operand on the right
    first, and here that is the smaller one. Either way the same numbers are summed, at most in another order.
    """
    way = arrangement(x, factor)
    if way is None:
        return nn.functional.linear(x, factor, bias)
    tokens = x.reshape(-1, x.shape[-1])
    if way == "blocks":
        blocks = factor.unflatten(0, (BLOCKS, -1)).mT
        y = torch.bmm(tokens.expand(BLOCKS, -1, -1), blocks).transpose(0, 1).reshape(len(tokens), -1)
    else:
        y = torch.mv(factor, tokens[0]) if len(tokens) == 1 else (factor @ tokens.mT).mT.contiguous()
    y = y.view(*x.shape[:-1], len(factor))
    return y if bias is None else y + bias


def arrangement(x: Tensor, factor: Tensor) -> Literal["blocks", "left"] | None:
    """How `linear` computes a product; None as `nn.functional.linear` does."""
    if (
        factor.numel() < LEAST_NUMBERS
        or not 0 < x.numel() <= MOST_TOKENS * x.shape[-1]
        or not _runs_on_cpu(x)
        or type(factor) is not nn.Parameter  # tensors of other libraries know `linear` alone
        or torch.is_autocast_enabled("cpu")
        or x.dtype != factor.dtype
    ):
        return None
    if x.dtype == torch.bfloat16:
        return "left" if _has_tiles() else None
    if x.dtype != torch.float32:
        return None
    if x.numel() // x.shape[-1] in LEFT_IN_FLOAT32 and _has_tiles():
        return "left"
    # With more threads than blocks MKL does better by itself.
    gains = len(factor) % BLOCKS == 0 and 1 < torch.get_num_threads() <= BLOCKS and torch.backends.mkl.is_available()
    return "blocks" if gains else None


def taken(x: Tensor, features: Tensor) -> Tensor:
    """`x[..., features]`, by what is fastest: in inference on a CPU `gather` takes a third of the time in bf16."""
    if not _runs_on_cpu(x):
        return x.index_select(-1, features)
    return x.gather(-1, features.expand(*x.shape[:-1], -1))


def _runs_on_cpu(x: Tensor) -> bool:
    """Whether this is inference on a CPU, which no compiler or exporter watches."""
    jit: Any = torch.jit
    watched = torch.compiler.is_compiling() or jit.is_tracing()
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not watched


@cache
def _has_tiles() -> bool:
    """Whether this CPU multiplies tiles (AMX), and PyTorch can tell: there products were measured from the left."""
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)
    return torch.backends.mkldnn.is_available() and bool(capabilities().get("amx_bf16", False))


class FactorMap(nn.Linear):
    """The map by one factor, as a module without parameters of its own: where libraries such as peft put an adapter.

    `weight` is the Parameter of the layer `of`, which is the first of its group for a shared basis. A layer runs its
    maps only if one of them was replaced; it gives them the factor that it holds itself.
    """

    _is_hf_initialized = True  # Transformers must not initialise the Parameter a second time

    def __init__(self, of: FactorisedLinear, factor: str):
        nn.Module.__init__(self)
        self.out_features, self.in_features = getattr(of, factor).shape
        self.register_parameter("bias", None)
        self._owner = (of,)  # in a tuple, or the layer would be a part of its own part
        self._factor = factor

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        (of,) = self._owner
        return cast("nn.Parameter", getattr(of, self._factor))

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:  # type: ignore[override]
        return linear(x, factor)


class SharedBasis(nn.Module):
    """The place of a basis's map, which all layers of its group look up here: so an adapter of the basis is there once.

    It is a part of the first layer alone: libraries that go through all modules find it, and merge its adapter, once.
    """

    def __init__(self, first: FactorisedLinear):
        super().__init__()
        self.basis_map: nn.Module = FactorMap(first, "basis")
        self.num_layers = 1


class Shapes(NamedTuple):
    """Shapes of what a layer stores: both factors, `[out, in]`, and by name the buffers it keeps, with their dtypes."""

    basis: tuple[int, int]
    weight: tuple[int, int]
    kept: Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class FactorisedLinear(nn.Module):
    """A linear layer whose matrix is stored as two factors: one class for each way to store them.

    `basis` is one Parameter object for all layers of a group, `weight` the layer's own. Both have the orientation of
    `nn.Linear`, `[out, in]`, and `basis` has one row per component. `kept` are buffers, alike in all layers of a group.
    The coefficients are called `weight` so that a process without the plug-in meets a tensor of the wrong shape (any
    rank that saves parameters is below d_in) and fails, instead of initialising the layer at random. A bias is called
    `output_bias` where `weight` need not have one row per output: Transformers cuts a `bias` beside a tied parameter
    to the rows of `weight`.
    """

    bias_name: ClassVar[str] = "output_bias"

    basis: nn.Parameter
    weight: nn.Parameter
    is_conv1d: bool

    def __init__(
        self, basis: nn.Parameter, weight: nn.Parameter, bias: nn.Parameter | None, *, is_conv1d: bool, **kept: Tensor
    ):
        super().__init__()
        self.basis = basis
        self.weight = weight
        self.register_parameter(self.bias_name, bias)
        for name, tensor in kept.items():
            self.register_buffer(name, tensor)
        self.is_conv1d = is_conv1d
        self._add_maps()

    def _add_maps(self) -> None:
        self.shared_basis = SharedBasis(self)
        self._place = (self.shared_basis,)  # in a tuple, or it would be a part of every layer of a group
        self.weight_map: nn.Module = FactorMap(self, "weight")

    @classmethod
    def shapes(cls, d_in: int, d_out: int, rank: int) -> Shapes:
        """What a layer for a matrix `[d_in, d_out]` stores at a rank; ValueError if it cannot have that rank."""
        raise NotImplementedError

    @classmethod
    def replacing(cls, dense: nn.Linear | Conv1D, basis: nn.Parameter, weight: nn.Parameter, **kept: Tensor) -> Self:
        """A layer that takes the place of `dense` and keeps its bias (the same Parameter) and its mode."""
        bias, conv1d = cast("nn.Parameter | None", dense.bias), isinstance(dense, Conv1D)
        return cls(basis, weight, bias, is_conv1d=conv1d, **kept).train(dense.training)

    def refresh(self) -> None:
        """Derives anew what follows from the kept buffers; called whenever these were read from a file."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    @property
    def in_features(self) -> int:
        raise NotImplementedError

    @property
    def out_features(self) -> int:
        raise NotImplementedError

    def factor_shape(self, name: str) -> tuple[int, int]:
        """Shape `[out, in]` of `basis` or `weight`, however it is stored."""
        rows, columns = getattr(self, name).shape
        return rows, columns

    @property
    def dtype(self) -> torch.dtype:
        """That in which the layer computes."""
        return self.weight.dtype

    @property
    def rank(self) -> int:
        return self.factor_shape("basis")[0]

    @property
    def any_bias(self) -> nn.Parameter | None:
        """The bias, whatever it is called."""
        return cast("nn.Parameter | None", getattr(self, self.bias_name))

    @property
    def is_adapted(self) -> bool:
        """Whether something, such as an adapter, was put in place of the map by a factor.

        ValueError if a shared basis itself is adapted, in each of its layers apart: merging would add all these to it.
        """
        if "parametrizations" in self._modules and self._place[0].num_layers > 1:
            parametrized: Any = self._modules["parametrizations"]
            if "basis" in parametrized:
                raise ValueError(
                    f"This layer shares its basis with {self._place[0].num_layers - 1} others, and it has an adapter "
                    "of its own on the Parameter `basis` (target_parameters in peft). Merged, the basis would get the "
                    'adapters of all layers. Name its map instead, which is there once: target_modules=["basis_map"].'
                )
        # Every forward asks. As attributes, modules are found by `nn.Module.__getattr__`, ten times as slowly.
        (place,) = self._place
        return type(self._modules["weight_map"]) is not FactorMap or type(place._modules["basis_map"]) is not FactorMap

    def forward(self, x: Tensor) -> Tensor:
        if self.is_adapted:
            return self._adapted(x)
        return self.through(x, lambda part: linear(part, self.basis), lambda z: linear(z, self.weight))

    def _adapted(self, x: Tensor) -> Tensor:
        basis, weight = self._place[0].basis_map, self.weight_map
        return self.through(x, lambda part: basis(part, self.basis), lambda z: weight(z, self.weight))

    def through(self, x: Tensor, basis: LinearMap, weight: LinearMap) -> Tensor:
        """The outputs, with other maps in the place of both factors: such as the factors with adapters."""
        raise NotImplementedError

    def product(self) -> Tensor:
        """The matrix `[d_out, d_in]`, in at least fp32, so that half-precision factors are rounded once."""
        raise NotImplementedError

    def to_dense(self) -> nn.Linear | Conv1D:
        """The ordinary layer with the same product, in the dtype of the factors; the bias is the same Parameter."""
        product = canonical(self.product().to(self.dtype))
        # Codes cannot be trained, what they stand for can.
        trained = self.weight.requires_grad or not self.weight.is_floating_point()
        return _dense_layer(self, product, self.any_bias, requires_grad=trained)

    def lora_layer(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The layer with a LoRA adapter of the whole matrix; arguments are those of peft's LoRA layers."""
        layer: nn.Module = _lora_class()(*args, **kwargs)
        return layer

    def with_term(self, down: Tensor, up: Tensor) -> CorrectedLinear:
        """The layer plus `up @ down`, a term of its own `[out, rank] @ [rank, in]`: the shared basis stays as it is."""
        terms = (nn.Parameter(canonical(t.detach().to(self.weight.device, self.dtype)), False) for t in (down, up))
        return CorrectedLinear(self, *terms)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.any_bias is not None}"
        )

    def _precise(self) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return self.basis.detach().to(dtype), self.weight.detach().to(dtype)


class SharedLinear(FactorisedLinear):
    """`y = (x @ basis^T) @ weight^T + bias`: a linear layer whose basis other layers may hold too.

    `basis` is `[rank, d_in]`, `weight` is `[d_out, rank]`.
    """

    bias_name = "bias"
    bias: nn.Parameter | None

    @classmethod
    def shapes(cls, d_in: int, d_out: int, rank: int) -> Shapes:
        return Shapes(basis=(rank, d_in), weight=(d_out, rank), kept={})

    @property
    def in_features(self) -> int:
        return self.factor_shape("basis")[1]

    @property
    def out_features(self) -> int:
        return self.factor_shape("weight")[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.is_adapted:
            return self._adapted(x)
        return linear(linear(x, self.basis), self.weight, self.bias)  # the bias at no cost

    def through(self, x: Tensor, basis: LinearMap, weight: LinearMap) -> Tensor:
        y = weight(basis(x))
        return y if self.any_bias is None else y + self.any_bias

    def product(self) -> Tensor:
        basis, weight = self._precise()
        return weight @ basis


class PivotedLinear(FactorisedLinear):
    """A layer one of whose factors holds an identity that is not stored: `rank` of its features are `pivots`.

    `pivots` holds one bit per feature, packed into bytes.
    """

    output_bias: nn.Parameter | None
    pivots: Tensor
    own_features: Tensor
    other_features: Tensor

    def __init__(
        self, basis: nn.Parameter, weight: nn.Parameter, bias: nn.Parameter | None, *, is_conv1d: bool, pivots: Tensor
    ):
        super().__init__(basis, weight, bias, is_conv1d=is_conv1d, pivots=pivots)
        for name, length in (("own_features", self.rank), ("other_features", self._others)):
            features = torch.empty(length, dtype=torch.int64, device=pivots.device)
            self.register_buffer(name, features, persistent=False)
        self.refresh()

    @property
    def _others(self) -> int:
        """Number of features that are no pivots."""
        raise NotImplementedError

    @property
    def is_pivot(self) -> Tensor:
        """Whether a feature is a pivot, for all of them."""
        return unpack_bits(self.pivots, self.rank + self._others)

    def refresh(self) -> None:
        """Derive from `pivots` which features are pivots, and which are not."""
        if self.pivots.is_meta:
            return
        is_pivot = self.is_pivot
        if int(is_pivot.sum()) != self.rank:
            raise ValueError(f"A layer of rank {self.rank} has {int(is_pivot.sum())} pivot bits.")
        self.own_features, self.other_features = is_pivot.nonzero()[:, 0], (~is_pivot).nonzero()[:, 0]


class PivotedOutputLinear(PivotedLinear):
    """`y = z || z @ weight^T` in the order of the output features, plus bias, with `z = x @ basis^T`.

    The basis `[rank, d_in]` consists of columns of the product itself, so `z` is a part of the outputs; `weight
    [d_out - rank, rank]` makes the others. For a layer that shares its basis with no other.
    """

    @classmethod
    def shapes(cls, d_in: int, d_out: int, rank: int) -> Shapes:
        _check_pivots(d_in, d_out, rank, features=d_out)
        return Shapes((rank, d_in), (d_out - rank, rank), {"pivots": ((-(-d_out // 8),), torch.uint8)})

    @property
    def in_features(self) -> int:
        return self.factor_shape("basis")[1]

    @property
    def out_features(self) -> int:
        return self.rank + self._others

    @property
    def _others(self) -> int:
        return self.factor_shape("weight")[0]

    def through(self, x: Tensor, basis: LinearMap, weight: LinearMap) -> Tensor:
        z = basis(x)
        y = self._ordered(z, weight(z))
        return y if self.output_bias is None else y + self.output_bias

    def product(self) -> Tensor:
        basis, weight = self._precise()
        return self._ordered(basis.T, basis.T @ weight.T).T

    def _ordered(self, own: Tensor, others: Tensor) -> Tensor:
        # Both are copied into one new tensor: on a CPU, concatenating and gathering takes up to three times as long.
        y = others.new_empty(*others.shape[:-1], self.out_features)
        return y.index_copy_(-1, self.own_features, own).index_copy_(-1, self.other_features, others)


class PivotedInputLinear(PivotedLinear):
    """`y = (x[own] + x[others] @ basis^T) @ weight^T` plus bias.

    `weight [d_out, rank]` consists of rows of the product itself, for which the inputs are taken as they are; `basis
    [rank, d_in - rank]` adds what the other inputs are worth in these. So every layer that holds the basis is spared
    the multiply-adds of the identity: with pivots among the outputs, they would be spared but once in all the group.
    """

    @classmethod
    def shapes(cls, d_in: int, d_out: int, rank: int) -> Shapes:
        _check_pivots(d_in, d_out, rank, features=d_in)
        return Shapes((rank, d_in - rank), (d_out, rank), {"pivots": ((-(-d_in // 8),), torch.uint8)})

    @property
    def in_features(self) -> int:
        return self.rank + self._others

    @property
    def out_features(self) -> int:
        return self.factor_shape("weight")[0]

    @property
    def _others(self) -> int:
        return self.factor_shape("basis")[1]

    def through(self, x: Tensor, basis: LinearMap, weight: LinearMap) -> Tensor:
        y = weight(taken(x, self.own_features) + basis(taken(x, self.other_features)))
        return y if self.output_bias is None else y + self.output_bias

    def product(self) -> Tensor:
        basis, weight = self._precise()
        product = weight.new_empty(self.out_features, self.in_features)
        return product.index_copy_(1, self.own_features, weight).index_copy_(1, self.other_features, weight @ basis)


def _check_pivots(d_in: int, d_out: int, rank: int, *, features: int) -> None:
    if rank > features:
        raise ValueError(f"the rank {rank} is above what layers of (d_in, d_out) = {(d_in, d_out)} have pivots for")


class Precision(NamedTuple):
    """How matrices are stored in whole numbers of `bits` bits: by row, in groups of `group_size` columns (None: one).

    A number stands for `(code - zero) * scale`. `symmetric` leaves zero points out: all are `2^(bits - 1)`.
    """

    bits: int
    group_size: int | None
    symmetric: bool

    def groups(self, columns: int) -> int:
        """Number of groups in a row; the last one may be smaller."""
        return -(-columns // (self.group_size or max(columns, 1)))

    def empty(self, rows: int, columns: int, like: Tensor) -> Packed:
        """Room for a matrix, in the dtype and on the device of the weight that it replaces."""
        numbers = rows * self.groups(columns)
        scale = like.new_empty(rows, self.groups(columns))
        codes, zero = (like.new_empty(packed_bytes(n, self.bits), dtype=torch.uint8) for n in (rows * columns, numbers))
        return Packed.of(codes, scale, None if self.symmetric else zero, (rows, columns))


class Packed(NamedTuple):
    """A matrix `[rows, columns]` in few bits: packed codes, a scale for each group, and packed zero points if any.

    All are Parameters that are not trained, so that layers of a group can hold the same ones.
    """

    codes: nn.Parameter
    scale: nn.Parameter
    zero: nn.Parameter | None
    shape: tuple[int, int]

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, zero: Tensor | None, shape: tuple[int, int]) -> Packed:
        # Bytes with a sign: T5 casts what it hands to a layer to the dtype of its `weight`, unless that is int8.
        codes = codes.view(torch.int8)
        parts = [None if part is None else nn.Parameter(part, requires_grad=False) for part in (codes, scale, zero)]
        return cls(cast("nn.Parameter", parts[0]), cast("nn.Parameter", parts[1]), parts[2], shape)


class Quantized(nn.Module):
    """A part of a layer that stores matrices in few bits: each under its name, with `NAME_scale` and `NAME_zero`.

    The codes of a matrix are one row of bytes: so a process without the plug-in meets a `weight` of the wrong shape and
    fails, whatever the bits. The matrix is made anew in every forward pass.
    """

    precision: Precision
    _shapes: dict[str, tuple[int, int]]

    def _hold(self, name: str, packed: Packed) -> None:
        """Keeps what belongs to the codes, which the layer itself keeps under their name."""
        self.register_parameter(f"{name}_scale", packed.scale)
        if packed.zero is not None:
            self.register_parameter(f"{name}_zero", packed.zero)

    def packed(self, name: str) -> Packed:
        """The matrix of this name as it is stored."""
        zero = None if self.precision.symmetric else getattr(self, f"{name}_zero")
        return Packed(getattr(self, name), getattr(self, f"{name}_scale"), zero, self._shapes[name])

    def matrix(self, name: str) -> Tensor:
        """The matrix of this name, `[out, in]`, in the dtype of its scales."""
        return unpacked(self.packed(name), self.precision)

    def numbers(self) -> dict[nn.Parameter, int]:
        """How many numbers every Parameter of the layer's matrices stands for; scales and zero points for none."""
        found: dict[nn.Parameter, int] = {}
        for name, (rows, columns) in self._shapes.items():
            packed = self.packed(name)
            found |= {packed.codes: rows * columns, packed.scale: 0}
            if packed.zero is not None:
                found[packed.zero] = 0
        return found


class QuantizedLinear(Quantized):
    """A linear layer that is not factorised, its matrix in few bits. The bias stays as it is."""

    weight: nn.Parameter
    weight_scale: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: Packed, bias: nn.Parameter | None, precision: Precision, *, is_conv1d: bool):
        super().__init__()
        self.precision = precision
        self._shapes = {"weight": weight.shape}
        self.weight = weight.codes
        self._hold("weight", weight)
        self.register_parameter("bias", bias)
        self.is_conv1d = is_conv1d

    @classmethod
    def replacing(cls, dense: nn.Linear | Conv1D, weight: Packed, precision: Precision) -> QuantizedLinear:
        """A layer that takes the place of `dense` and keeps its bias (the same Parameter) and its mode."""
        bias = cast("nn.Parameter | None", dense.bias)
        return cls(weight, bias, precision, is_conv1d=isinstance(dense, Conv1D)).train(dense.training)

    @property
    def in_features(self) -> int:
        return self._shapes["weight"][1]

    @property
    def out_features(self) -> int:
        return self._shapes["weight"][0]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix("weight"), self.bias)

    def to_dense(self) -> nn.Linear | Conv1D:
        """The ordinary layer with what the codes stand for; the bias is the same Parameter."""
        return _dense_layer(self, canonical(self.matrix("weight")), self.bias, requires_grad=True)

    def lora_layer(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As `FactorisedLinear.lora_layer`: an adapter beside the codes."""
        layer: nn.Module = _lora_class()(*args, **kwargs)
        return layer

    def with_term(self, down: Tensor, up: Tensor) -> CorrectedLinear:
        """ValueError: codes have no room for a term."""
        raise ValueError(
            f"This layer stores its matrix in {self.precision.bits} bits, into which no adapter can be merged. Keep "
            "the adapter beside the model, or make the model dense first (bs_exp.to_dense)."
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.precision.bits}"


class QuantizedFactors(Quantized, FactorisedLinear):
    """A factorised layer whose `basis` and `weight` are packed codes. Its maps take no adapters: there is no factor."""

    bias_name = "output_bias"  # codes do not have one row per output

    basis_scale: nn.Parameter
    weight_scale: nn.Parameter

    def __init__(
        self,
        basis: Packed,
        weight: Packed,
        bias: nn.Parameter | None,
        *,
        precision: Precision,
        is_conv1d: bool,
        **kept: Tensor,
    ):
        # Before the rest, which asks for shapes. Neither is a part of a module.
        self.precision = precision
        self._shapes = {"basis": basis.shape, "weight": weight.shape}
        super().__init__(basis.codes, weight.codes, bias, is_conv1d=is_conv1d, **kept)
        self._hold("basis", basis)
        self._hold("weight", weight)

    def _add_maps(self) -> None:
        """None: libraries would put adapters on them, and merge these into codes."""

    @property
    def is_adapted(self) -> bool:
        return False

    def factor_shape(self, name: str) -> tuple[int, int]:
        return self._shapes[name]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight_scale.dtype

    def forward(self, x: Tensor) -> Tensor:
        linear = nn.functional.linear
        return self.through(
            x, lambda part: linear(part, self.matrix("basis")), lambda z: linear(z, self.matrix("weight"))
        )

    def _precise(self) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(self.dtype, torch.float32)
        return self.matrix("basis").to(dtype), self.matrix("weight").to(dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.precision.bits}"


_QUANTIZED: dict[str, type[QuantizedFactors]] = {}


def quantized_kind(kind: type[FactorisedLinear]) -> type[QuantizedFactors]:
    """The class of layers that are like those of `kind`, with their factors in few bits; the same for every call."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name not in _QUANTIZED or not issubclass(_QUANTIZED[name], kind):
        own = {"__module__": kind.__module__}
        _QUANTIZED[name] = type(f"Quantized{kind.__name__}", (QuantizedFactors, kind), own)
    return _QUANTIZED[name]


def __getattr__(name: str) -> type[QuantizedFactors]:
    """`QuantizedX` for a kind X of this file, made when it is asked for: so pickle finds it in a fresh process."""
    kind = globals().get(name.removeprefix("Quantized")) if name.startswith("Quantized") else None
    if not (isinstance(kind, type) and issubclass(kind, FactorisedLinear)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return quantized_kind(kind)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that so many codes of so many bits take."""
    return -(-count * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (bytes, of which the lower `bits` count) as one row of bytes, the first code in the lowest bits.

    At 8 bits they stay as they are; at 4 two share a byte; at 3 eight share three bytes. Only the last byte may be
    filled up, so that rows of odd widths cost nothing.
    """
    codes = codes.reshape(-1)
    if bits == 8:
        return codes.clone()
    ones = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    return pack_bits(((codes[:, None] >> ones) & 1).flatten())


def unpack_codes(packed: Tensor, count: int, bits: int) -> Tensor:
    """The first `count` codes of packed bytes, one a byte."""
    if bits == 8:
        return packed[:count]
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), dim=1).flatten()[:count]
    # Eight codes are `bits` bytes, which one number of 64 bits holds.
    whole = nn.functional.pad(packed, (0, -len(packed) % bits)).view(-1, bits).long()
    places = torch.arange(8, device=packed.device)
    words: Tensor = (whole << (8 * places[:bits])).sum(dim=1)
    codes: Tensor = (words[:, None] >> (bits * places)) & (2**bits - 1)
    return codes.to(torch.uint8).flatten()[:count]


def unpacked(packed: Packed, precision: Precision) -> Tensor:
    """The matrix that packed codes stand for, in the dtype of the scales."""
    rows, columns = packed.shape
    scale, groups = packed.scale.detach(), precision.groups(columns)
    codes = (
        unpack_codes(packed.codes.view(torch.uint8), rows * columns, precision.bits).view(rows, columns).to(scale.dtype)
    )
    if packed.zero is None:
        zero = scale.new_full((1, 1), 2 ** (precision.bits - 1)).expand(rows, groups)
    else:
        zero = unpack_codes(packed.zero, rows * groups, precision.bits).view(rows, groups).to(scale.dtype)
    if groups > 1:
        size = cast("int", precision.group_size)
        scale, zero = (part.repeat_interleave(size, dim=1)[:, :columns] for part in (scale, zero))
    # Differences of codes are exact in every dtype, and the product is rounded once.
    return (codes - zero) * scale


class CorrectedLinear(nn.Module):
    """`y = shared(x) + (x @ down^T) @ weight^T`: a layer that shares a basis, and a low-rank term of its own.

    `down` is `[correction, d_in]`, `weight` is `[d_out, correction]`, called so for the same reason as in
    `SharedLinear`. The bias belongs to `shared`.
    """

    def __init__(self, shared: FactorisedLinear, down: nn.Parameter, weight: nn.Parameter):
        super().__init__()
        self.shared = shared
        self.down = down
        self.weight = weight
        self.train(shared.training)

    @property
    def in_features(self) -> int:
        return self.shared.in_features

    @property
    def out_features(self) -> int:
        return self.shared.out_features

    @property
    def any_bias(self) -> nn.Parameter | None:
        """The bias, whatever it is called."""
        return self.shared.any_bias

    def forward(self, x: Tensor) -> Tensor:
        linear = nn.functional.linear
        y: Tensor = self.shared(x) + linear(linear(x, self.down), self.weight)
        return y

    def lora_layer(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As `FactorisedLinear.lora_layer`."""
        layer: nn.Module = _lora_class()(*args, **kwargs)
        return layer

    def with_term(self, down: Tensor, up: Tensor) -> CorrectedLinear:
        """The layer plus `up @ down`: both terms of low rank in one, of the sum of their ranks."""
        down, up = (new.detach().to(old) for new, old in ((down, self.down), (up, self.weight)))
        terms = torch.cat([self.down.detach(), down]), torch.cat([self.weight.detach(), up], dim=1)
        return CorrectedLinear(self.shared, *(nn.Parameter(canonical(term), False) for term in terms))

    def without_term(self, rank: int) -> FactorisedLinear | CorrectedLinear:
        """The layer as it was before `with_term` added a term of this rank, to the bit."""
        left = self.down.shape[0] - rank
        if not left:
            return self.shared
        down, up = canonical(self.down.detach()[:left]), canonical(self.weight.detach()[:, :left])
        return CorrectedLinear(self.shared, nn.Parameter(down, False), nn.Parameter(up, False))

    def to_dense(self) -> nn.Linear | Conv1D:
        """The ordinary layer with the sum of both products, in the dtype of the factors."""
        dense = self.shared.to_dense()
        precise = torch.promote_types(self.weight.dtype, torch.float32)
        product = self.weight.detach().to(precise) @ self.down.detach().to(precise)
        with torch.no_grad():
            dense.weight += (product.T if self.shared.is_conv1d else product).to(dense.weight.dtype)
        return dense

    def extra_repr(self) -> str:
        return f"correction={self.down.shape[0]}"


class SplitLinear(nn.Module):
    """A linear layer cut into blocks, each a layer of its own: of its outputs (`axis` "out") or of its inputs ("in").

    `y = block_0(x) || block_1(x) || ..`, or `y = block_0(x_0) + block_1(x_1) + ..`, plus bias. The sizes of the blocks
    are a buffer called `weight`, so that a process without the plug-in meets a tensor of the wrong shape and fails; the
    bias is called `output_bias` for the same reason as in `FactorisedLinear`.
    """

    output_bias: nn.Parameter | None
    weight: Tensor

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        bias: nn.Parameter | None,
        sizes: Sequence[int],
        *,
        axis: str,
        is_conv1d: bool,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.register_parameter("output_bias", bias)
        device = next(self.blocks.parameters()).device
        self.register_buffer("weight", torch.tensor(sizes, dtype=torch.int32, device=device))
        self.axis = axis
        self.sizes = tuple(sizes)
        self.is_conv1d = is_conv1d

    @classmethod
    def cutting(cls, dense: nn.Linear | Conv1D, sizes: Sequence[int], axis: str) -> SplitLinear:
        """The layer in blocks, whose weights are views of its own; the bias stays the same Parameter."""
        shape = _shape(dense, "layer")
        if axis not in AXES or sum(sizes) != shape[AXES.index(axis)]:
            raise ValueError(
                f"A layer of (d_in, d_out) = {shape} cannot be cut into {_shown(list(sizes))} along {axis!r}."
            )
        conv1d, bias = isinstance(dense, Conv1D), cast("nn.Parameter | None", dense.bias)
        weight = dense.weight.detach().T if conv1d else dense.weight.detach()
        parts = weight.split(list(sizes), dim=0 if axis == "out" else 1)
        blocks = [_linear_with(nn.Parameter(part, dense.weight.requires_grad)) for part in parts]
        return cls(blocks, bias, sizes, axis=axis, is_conv1d=conv1d).train(dense.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.axis == "out":
            y = torch.cat([block(x) for block in self.blocks], dim=-1)
        else:
            first, *others = (block(part) for block, part in zip(self.blocks, x.split(self.sizes, -1), strict=True))
            y = sum(others, start=first)
        return y if self.output_bias is None else y + self.output_bias

    def lora_layer(self, *args: Any, **kwargs: Any) -> nn.Module:
        """ValueError: each block can have an adapter, and the matrix as a whole none."""
        raise ValueError(
            f"{kwargs.get('target_name')} is cut into blocks (sharing=heads), and an adapter of the whole could not be "
            'merged. Name its blocks: target_modules=r".*_proj\\.blocks\\.\\d+", or make the model dense first '
            "(bs_exp.to_dense)."
        )

    def own(self) -> None:
        """Gives blocks that stay dense weights of their own, instead of views."""
        for block in self.blocks:
            if isinstance(block, nn.Linear):
                block.weight = nn.Parameter(canonical(block.weight.detach()), block.weight.requires_grad)

    def merged(self) -> nn.Linear | Conv1D:
        """The ordinary layer, once all blocks are dense; the bias is the same Parameter."""
        weights = [cast("nn.Parameter", block.weight) for block in self.blocks]
        whole = torch.cat([weight.detach() for weight in weights], dim=0 if self.axis == "out" else 1)
        trained = any(weight.requires_grad for weight in weights)
        return _dense_layer(self, whole, self.output_bias, requires_grad=trained)

    def extra_repr(self) -> str:
        return f"axis={self.axis}, sizes={list(self.sizes)}, bias={self.output_bias is not None}"


AXES = ("in", "out")


class Expert(nn.Module):
    """One expert: `y = down(act(gate(x)) * up(x))`, each of the three a linear layer of its own."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module):
        super().__init__()
        self.gate_layer = gate
        self.up_layer = up
        self.down_layer = down

    def forward(self, x: Tensor, act: LinearMap) -> Tensor:
        y: Tensor = self.down_layer(act(self.gate_layer(x)) * self.up_layer(x))
        return y


class UnfusedExperts(nn.Module):
    """The experts of a block as modules, in place of one that holds all of them as tensors of three axes.

    It computes what the eager code of Transformers does: every expert reads the tokens that are routed to it. Its
    layers are called `gate_layer` and so on: what is called `gate_proj`, `w1` or `gate` in a file, Transformers fuses
    or renames in some families as it loads it. With `evenly`, tokens are shared out evenly in place of routed: for
    tensors without values, which say nothing.
    """

    evenly = False

    def __init__(self, members: Sequence[Expert], fused: nn.Module):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.act_fn = cast("Any", fused).act_fn
        # Without its tensors, and in a tuple, or it would be a part of the model.
        self._fused = (_without_tensors(fused),)

    @classmethod
    def unfusing(cls, fused: nn.Module) -> UnfusedExperts:
        """The experts apart; their weights are views of the fused ones. ValueError unless `can_unfuse` says so."""
        if not can_unfuse(fused):
            raise ValueError(f"{type(fused).__name__} holds no experts that can be taken apart.")
        gate_up, down = (cast("nn.Parameter", getattr(fused, name)) for name in FUSED)
        parts = [(*both.detach().chunk(2), out.detach()) for both, out in zip(gate_up, down, strict=True)]
        trained = gate_up.requires_grad
        members = [Expert(*(_linear_with(nn.Parameter(part, trained)) for part in each)) for each in parts]
        return cls(members, fused).train(fused.training)

    def routes(self, top_k_index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """As `routed`, for these experts, in the order in which they run and read the tokens."""
        shared_out = evenly_routed if self.evenly else routed
        return shared_out(top_k_index, len(self.members))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        found = torch.zeros_like(hidden_states)
        for number, tokens, places in self.routes(top_k_index):
            y = self.members[number](hidden_states[tokens], self.act_fn)
            y = y * top_k_weights[tokens, places, None]
            found.index_add_(0, tokens, y.to(found.dtype))
        return found

    def own(self) -> None:
        """Gives layers that stay dense weights of their own, instead of views."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and not isinstance(layer, FactorMap):
                layer.weight = nn.Parameter(canonical(layer.weight.detach()), layer.weight.requires_grad)

    def fused(self) -> nn.Module:
        """The module as Transformers has it, once all layers are dense."""
        gates, ups, downs = (
            [cast("Tensor", getattr(member, name).weight) for member in self.members]
            for name in ("gate_layer", "up_layer", "down_layer")
        )
        both = [torch.cat([gate.detach(), up.detach()]) for gate, up in zip(gates, ups, strict=True)]
        whole = _without_tensors(self._fused[0])
        for name, parts in zip(FUSED, (both, downs), strict=True):
            trained = all(part.requires_grad for part in downs)
            setattr(whole, name, nn.Parameter(torch.stack([part.detach() for part in parts]), trained))
        return whole.train(self.training)


# What a module of fused experts calls its tensors: [experts, 2 * hidden, d] and [experts, d, hidden].
FUSED = ("gate_up_proj", "down_proj")


def can_unfuse(module: nn.Module) -> bool:
    """Whether a module holds gated experts without biases, `y = down(act(gate(x)) * up(x))`, as tensors of three axes.

    Asked are the words by which Transformers tells kernels how experts are stored (`use_experts_implementation`).
    """
    told = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    if any(getattr(module, name, None) is not value for name, value in told.items()):
        return False
    gating = getattr(type(module), "_apply_gate", None)
    if getattr(module, "has_post_expert_norm", False) or getattr(gating, "__name__", "") != "_default_apply_gate":
        return False
    if set(dict(module.named_parameters())) != set(FUSED) or any(True for _ in module.buffers()):
        return False
    both, down = (getattr(module, name) for name in FUSED)
    return (
        both.ndim == down.ndim == 3
        and len(both) == len(down)
        and both.shape[1] == 2 * down.shape[2]
        and both.shape[2] == down.shape[1]
    )


def routed(top_k_index: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For every expert that a token is routed to: its number, the tokens, and which of their choices it is.

    Indices are those of the chosen experts, `[tokens, choices]`; one past the last expert is nobody's.
    """
    with torch.no_grad():
        chosen = nn.functional.one_hot(top_k_index, num_classes=experts + 1).permute(2, 1, 0)
        hit = torch.greater(chosen.sum(dim=(-1, -2)), 0).nonzero()[:, 0].tolist()
    for number in hit:
        if number < experts:
            places, tokens = torch.where(chosen[number])
            yield number, tokens, places


def evenly_routed(top_k_index: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """As many tokens for every expert, whatever was chosen."""
    each = -(-top_k_index.numel() // experts)
    for number in range(min(experts, top_k_index.numel())):
        some = top_k_index.new_zeros(min(each, len(top_k_index)))
        yield number, some, some


def _without_tensors(module: nn.Module) -> nn.Module:
    """A copy of a module without its parameters; what else it holds is shared."""
    bare = copy.copy(module)
    bare._parameters = dict.fromkeys(module._parameters)
    return bare


def _linear_with(weight: nn.Parameter) -> nn.Linear:
    """A layer with this weight, and without a bias."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = weight
    return layer


def canonical(tensor: Tensor) -> Tensor:
    """A copy with the strides that a tensor read from a file has.

    `contiguous()` leaves those of sides of 1 as they are, and kernels that look at them round in another way.
    """
    return tensor.clone(memory_format=torch.contiguous_format)


def pack_bits(bits: Tensor) -> Tensor:
    """Booleans as bytes, eight each, the first in the lowest bit."""
    padded = nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, length: int) -> Tensor:
    """The first `length` booleans of packed bytes."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).flatten()[:length].bool()


def _dense_layer(
    layer: FactorisedLinear | QuantizedLinear | SplitLinear,
    product: Tensor,
    bias: nn.Parameter | None,
    *,
    requires_grad: bool,
) -> nn.Linear | Conv1D:
    """The dense layer with the weight `product [d_out, d_in]` that a layer of this file stands for."""
    d_out, d_in = product.shape
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        dense: nn.Linear | Conv1D = (
            Conv1D(d_out, d_in) if layer.is_conv1d else nn.Linear(d_in, d_out, bias=bias is not None)
        )
    dense.weight = nn.Parameter(canonical(product.T) if layer.is_conv1d else product, requires_grad)
    dense.register_parameter("bias", bias)
    return dense.train(layer.training)


def share_basis(layers: Sequence[FactorisedLinear]) -> None:
    """Has the layers of a group, which hold one basis, look up its map in one place too."""
    for layer in layers[1:]:
        del layer.shared_basis
        layer._place = layers[0]._place
    layers[0]._place[0].num_layers = len(layers)


def pivoted_kind(members: int) -> type[PivotedLinear]:
    """Where the layers of a group of so many have their pivots: among the inputs if they share a basis.

    A single layer computes as much either way; with pivots among its outputs, more of it in products with a long inner
    side, which CPUs like better.
    """
    return PivotedInputLinear if members > 1 else PivotedOutputLinear


def shared_kind(members: int) -> type[SharedLinear]:
    """The same class for groups of every size."""
    return SharedLinear


# How a group's factors are stored -> the class of its layers, by their number. Another layout is a row here.
LAYOUTS: dict[str, Callable[[int], type[FactorisedLinear]]] = {"plain": shared_kind, "pivoted": pivoted_kind}


def empty_layers(
    layout: str,
    dense: Sequence[nn.Module],
    members: Sequence[str],
    rank: int,
    precision: Precision | None = None,
) -> list[FactorisedLinear]:
    """Layers of a rank, not yet filled, in place of the given ones; they hold one basis.

    Raises ValueError, by the names of the `members`, for layers that cannot have it.
    """
    linear, sides = _linear_layers(dense, members)
    kind = LAYOUTS[layout](len(linear))
    try:
        shapes = [kind.shapes(d_in, d_out, rank) for d_in, d_out in sides]
    except ValueError as error:
        raise ValueError(f"quantization_config: {error} ({_shown(members)}). It does not fit this model.") from error
    full = min(sides[0][0], sum(d_out for _, d_out in sides))
    if rank > full:
        raise ValueError(
            f"quantization_config: the rank of {_shown(members)} must be at most {full}, the full rank of layers of "
            f"(d_in, d_out) = {_shown(sides)}, got {rank}. It does not fit this model."
        )
    if precision is not None:
        return _empty_quantized(quantized_kind(kind), linear, shapes, precision)
    basis = nn.Parameter(linear[0].weight.new_empty(shapes[0].basis))
    layers = []
    for layer, shape in zip(linear, shapes, strict=True):
        weight = nn.Parameter(layer.weight.new_empty(shape.weight))
        layers.append(kind.replacing(layer, basis, weight, **_empty_kept(shape)))
    share_basis(layers)
    return layers


def _empty_kept(shapes: Shapes) -> dict[str, Tensor]:
    with torch.device("meta"):  # they come with the checkpoint
        return {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in shapes.kept.items()}


def _empty_quantized(
    kind: type[QuantizedFactors],
    dense: Sequence[nn.Linear | Conv1D],
    shapes: Sequence[Shapes],
    precision: Precision,
) -> list[FactorisedLinear]:
    basis = precision.empty(*shapes[0].basis, like=dense[0].weight)
    return [
        kind(
            basis,
            precision.empty(*shape.weight, like=layer.weight),
            cast("nn.Parameter | None", layer.bias),
            precision=precision,
            is_conv1d=isinstance(layer, Conv1D),
            **_empty_kept(shape),
        ).train(layer.training)
        for layer, shape in zip(dense, shapes, strict=True)
    ]


def _with_correction(shared: FactorisedLinear, rank: int) -> FactorisedLinear | CorrectedLinear:
    """The layer with a correction of that rank, not yet filled; itself for rank 0."""
    if rank == 0:
        return shared
    sides = shared.in_features, shared.out_features
    if rank > min(sides):
        raise ValueError(
            f"quantization_config: a correction of layers of (d_in, d_out) = {sides} must be at most {min(sides)}, got "
            f"{rank}. It does not fit this model."
        )
    like = torch.empty(0, dtype=shared.dtype, device=shared.weight.device)
    down, weight = like.new_empty(rank, shared.in_features), like.new_empty(shared.out_features, rank)
    return CorrectedLinear(shared, nn.Parameter(down), nn.Parameter(weight))


class BasisSharingConfig(QuantizationConfigMixin):
    """The `quantization_config` of a model: per group its member modules (the first owns the basis) and its rank."""

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]] = (),
        layout: str = "plain",
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
        splits: Sequence[Mapping[str, Any]] = (),
        crc32: Mapping[str, str] | None = None,
        precision: Mapping[str, Any] | None = None,
        quantized: Sequence[str] = (),
        experts: Sequence[str] = (),
        **unknown: object,
    ):
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"This model is stored in format version {format_version} of {METHOD!r}, this code reads version "
                f"{FORMAT_VERSION}. Install a matching bs_exp, or load with trust_remote_code=True in a process that "
                "has not imported bs_exp."
            )
        if unknown:
            raise ValueError(f"quantization_config of {METHOD!r} has unknown keys: {', '.join(sorted(unknown))}.")
        if not isinstance(layout, str) or layout not in LAYOUTS:
            raise ValueError(f"quantization_config.layout must be one of {', '.join(LAYOUTS)}, got {_shown(layout)}.")
        _check_groups(groups)
        self.quant_method: Any = quant_method  # the base class knows only the methods that Transformers brings
        self.format_version = format_version
        self.layout = layout
        self.groups = [dict(group) for group in groups]
        if splits:
            self.splits = _checked_splits(splits)
        if experts:
            self.experts = _checked_names("experts", experts)
        if crc32 is not None:
            self.crc32 = _checked_sums(crc32)
        if precision is not None:
            self.precision = checked_precision(precision)
            self.quantized = _checked_names("quantized", quantized)
        elif quantized:
            raise ValueError(
                "quantization_config.quantized names layers, so quantization_config.precision must be set."
            )

    @property
    def stored_precision(self) -> Precision | None:
        """In how many bits the matrices of groups, and of the layers `quantized`, are stored; None: as floats."""
        found = getattr(self, "precision", None)
        return None if found is None else Precision(**found)


class BasisSharingQuantizer(HfQuantizer):
    """Builds the factorised layers before the weights are loaded, and declares which parameters are one."""

    format_version = FORMAT_VERSION
    requires_calibration = True
    quantization_config: BasisSharingConfig
    # What arranged the factors, in the process that compressed the model; a folder holds its name alone.
    arranged_by: Any = None
    # The files of weights that the model is loaded from.
    files_read: tuple[str, ...] = ()
    # What `save_pretrained` was given to save in place of the model's own tensors, while it saves.
    given_state: Mapping[str, Tensor] | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if int(transformers.__version__.split(".")[0]) < 5:
            raise ImportError(f"{METHOD!r} needs transformers 5 or newer, got {transformers.__version__}.")

    def update_attn_implementation(self, config: Any) -> Any:
        """The configuration without the word for who lacks the plug-in (`_word_without_plugin`).

        Transformers asks before it looks for files and builds the model: the last moment to refuse.
        """
        vars(config).pop(_WEIGHTS_FILE, None)
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            for name in _DEPTHS:
                depth = getattr(part, name, None)
                if isinstance(depth, int) and depth > MOST_LAYERS:
                    raise ValueError(f"config.json: {name} must be at most {MOST_LAYERS}, got {depth}.")
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.files_read = tuple(kwargs.get("checkpoint_files") or ())
        for name in self._experts(model):
            fused = model.get_submodule(name)
            if not can_unfuse(fused):
                raise ValueError(
                    f"quantization_config.experts names {name}, a {type(fused).__name__}, which holds no experts that "
                    "can be taken apart. It does not fit this model."
                )
            model.set_submodule(name, UnfusedExperts.unfusing(fused))
        for split in getattr(self.quantization_config, "splits", ()):
            (name,) = _local_names(model, {"members": [split["module"]]})
            dense = model.get_submodule(name)
            model.set_submodule(name, SplitLinear.cutting(dense, split["sizes"], split["axis"]))
        layout, precision = self.quantization_config.layout, self.quantization_config.stored_precision
        for group in self.quantization_config.groups:
            names = _local_names(model, group)
            dense = [model.get_submodule(n) for n in names]
            layers = empty_layers(layout, dense, group["members"], group["rank"], precision)
            for name, layer in zip(names, layers, strict=True):
                model.set_submodule(name, _with_correction(layer, group.get("correction", 0)))
        if precision is not None:
            for name in self._quantized(model):
                (linear,), [(d_in, d_out)] = _linear_layers([model.get_submodule(name)], [name])
                packed = precision.empty(d_out, d_in, like=linear.weight)
                model.set_submodule(name, QuantizedLinear.replacing(linear, packed, precision))
        self.declare_ties(model)
        self._check_what_is_loaded(model)

    def _check_what_is_loaded(self, model: Any) -> None:
        """Has the model, once its weights are read, refuse a file that does not hold every tensor of every group.

        Transformers would leave memory as it finds it in place of them. It tells the model what is missing through
        this method, before it fills the gaps or moves weights to other devices.
        """
        usual = model._adjust_missing_and_unexpected_keys
        built = self._shapes(model)

        def adjust(loading: Any) -> None:
            del model._adjust_missing_and_unexpected_keys
            # Transformers 5.19 takes a basis of another shape as it is, instead of calling it mismatched.
            other = {key for key, shape in self._shapes(model).items() if shape != built.get(key)}
            missing, unexpected = other | set(loading.missing_and_mismatched()), set(loading.unexpected_keys)
            usual(loading)
            self._check_loaded(model, missing, unexpected)

        model._adjust_missing_and_unexpected_keys = adjust

    def _check_loaded(self, model: Any, missing: set[str], unexpected: set[str]) -> None:
        for names in self._modules(model):
            absent = sorted(key for name in names for key in _tensors_of(model, name) if key in missing)
            if absent:
                raise ValueError(
                    f"The file of the weights holds no tensor {absent[0]} that fits ({len(absent)} of this group are "
                    f"missing or of another shape), though quantization_config.groups declares {_shown(names)}. The "
                    "file is damaged, or belongs to another config.json."
                )
            if len({id(layer.basis) for layer in _factorised(model, names)}) > 1:
                raise ValueError(
                    f"The file of the weights holds different bases for {_shown(names)}, which "
                    "quantization_config.groups declares as one group. It belongs to another config.json."
                )
        surplus = sorted(key for key in unexpected if key.rpartition(".")[2] in ("basis", "pivots"))
        if surplus:
            raise ValueError(
                f"The file of the weights holds {surplus[0]}, of which quantization_config.groups says nothing. It "
                "belongs to another config.json."
            )
        for split in getattr(self.quantization_config, "splits", ()):
            (name,) = _local_names(model, {"members": [split["module"]]})
            sizes = model.get_submodule(name).weight
            if not sizes.is_meta and sizes.tolist() != split["sizes"]:
                raise ValueError(
                    f"The blocks of {name} have other sizes in the file of the weights, {_shown(sizes.tolist())}, than "
                    f"in quantization_config.splits, {_shown(split['sizes'])}. It belongs to another config.json."
                )

    def _shapes(self, model: Any) -> dict[str, torch.Size]:
        """Shapes of all tensors of all groups."""
        return {
            f"{name}.{key}": tensor.shape
            for names in self._modules(model)
            for name in names
            for key, tensor in model.get_submodule(name).state_dict().items()
        }

    def _modules(self, model: Any) -> Iterator[list[str]]:
        """Names of the modules of every group, and of every matrix that is cut into blocks."""
        for group in self.quantization_config.groups:
            yield _local_names(model, group)
        for split in getattr(self.quantization_config, "splits", ()):
            yield _local_names(model, {"members": [split["module"]]})
        for name in (*self._quantized(model), *self._experts(model)):
            yield [name]

    def _quantized(self, model: Any) -> list[str]:
        """Names of the layers that are no factors, and are stored in few bits."""
        return _local_names(model, {"members": getattr(self.quantization_config, "quantized", ())})

    def _experts(self, model: Any) -> list[str]:
        """Names of the modules whose experts are taken apart."""
        return _local_names(model, {"members": getattr(self.quantization_config, "experts", ())})

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for layer in model.modules():
            if isinstance(layer, Quantized):  # Transformers makes every float a Parameter that is trained
                for parameter in layer.numbers():
                    parameter.requires_grad_(False)
        for group in self.quantization_config.groups:
            _settle(_factorised(model, _local_names(model, group)), group)
            group.pop(CHECKSUM, None)  # there while saving only: what is trained on may change what is kept
        # Last: what is missing or does not fit is told by its name.
        check_files(self.files_read, vars(self.quantization_config).pop(FILE_CHECKSUMS, {}))
        if _is_own_auto_map(getattr(model.config, "auto_map", None)):
            del model.config.auto_map  # there while saving only: what is made of this config may have no such file
        # On the instance: the model is of a native class, which knows no plug-in that would write a file of its own.
        for name, method in _METHODS.items():
            setattr(model, name, MethodType(method, model))
        _tell_peft()

    def attach(self, model: Any) -> None:
        """Make a model whose layers were just replaced the same as one that `from_pretrained` returns."""
        self.declare_ties(model)
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = self.quantization_config.quant_method
        self.postprocess_model(model)

    def declare_ties(self, model: Any) -> None:
        ties = self._ties(model)
        # Read when saving, and when tying anew, where adapters may have changed the names.
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **_patterns(ties)}
        model.all_tied_weights_keys.update(ties)  # read when loading

    def _ties(self, model: Any) -> dict[str, str]:
        """Basis of every further member -> basis of the owner."""
        ties = {}
        for group in self.quantization_config.groups:
            owner, *peers = (
                f"{name}.shared.basis" if isinstance(model.get_submodule(name), CorrectedLinear) else f"{name}.basis"
                for name in _local_names(model, group)
            )
            ties.update({f"{peer}{end}": f"{owner}{end}" for peer in peers for end in self._endings})
        return ties

    @property
    def _endings(self) -> tuple[str, ...]:
        """What is behind the names of the tensors that a basis consists of."""
        precision = self.quantization_config.stored_precision
        if precision is None:
            return ("",)
        return ("", "_scale") if precision.symmetric else ("", "_scale", "_zero")

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        # The base class would impose config.dtype, which `model.to(...)` does not keep up to date.
        model = super().dequantize(model, dtype=dtype)  # type: ignore[no-untyped-call]
        return model if dtype is None else model.to(dtype)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        ties = self._ties(model)
        for group in self.quantization_config.groups:
            for name in _local_names(model, group):
                model.set_submodule(name, model.get_submodule(name).to_dense())
        for name in self._quantized(model):
            model.set_submodule(name, model.get_submodule(name).to_dense())
        for split in getattr(self.quantization_config, "splits", ()):
            (name,) = _local_names(model, {"members": [split["module"]]})
            model.set_submodule(name, model.get_submodule(name).merged())
        for name in self._experts(model):
            model.set_submodule(name, model.get_submodule(name).fused())
        patterns = _patterns(ties)
        # A layer may have got its own term, such as a merged adapter, since its tie was declared.
        names = ties.keys() | {name.replace(".shared.basis", ".basis") for name in ties}
        model._tied_weights_keys = {k: v for k, v in model._tied_weights_keys.items() if k not in patterns} or None
        model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if k not in names}
        return model

    def remove_quantization_config(self, model: Any) -> None:
        super().remove_quantization_config(model)  # type: ignore[no-untyped-call]
        for name in _METHODS:
            vars(model).pop(name, None)
        for module in model.modules():
            if hasattr(module, "config") and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What is saved: every tensor under the name that stays, so that a shared basis is there once.

        Transformers would look for the names of all ties in those of all tensors: minutes with hundreds of experts.
        It also drops the tensors that `save_pretrained(state_dict=...)` was given, which are used here.
        """
        if self.given_state is not None:
            return dict(self.given_state), {}
        held, ties = model.state_dict(keep_vars=True), self._ties(model)
        again = {name for name, owner in ties.items() if name in held and held[name] is held.get(owner)}
        return {name: tensor for name, tensor in model.state_dict().items() if name not in again}, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        # The factors are ordinary floating-point parameters, unless they are codes: a Trainer may train them.
        return self.quantization_config.stored_precision is None

    @property
    def is_compileable(self) -> bool:
        return True


def save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """As the model's class saves it, with a copy of this file and the `auto_map` through which Auto classes find it.

    At last config.json gets the checksums of what was written. An upload in the same call comes after that, with a
    README.md that lies in the folder as it is; `model.push_to_hub(...)` saves first, too.
    """
    save = type(model).save_pretrained
    folder = Path(save_directory)
    is_writer = model.should_save_on_this_rank(is_main_process)
    # Of a model with adapters these alone are saved: neither its weights nor its configuration.
    if not is_writer or getattr(model, "_hf_peft_config_loaded", False):
        save(model, save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        return
    hub = {name: kwargs.pop(name) for name in ("repo_id", "commit_message", "create_pr", "private") if name in kwargs}
    _declare_terms(model)
    own_code = model.is_remote_code()  # it brings an auto_map, which must stay
    if not own_code:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, folder / f"{REMOTE_MODULE}.py")
        model.config.auto_map = auto_map(model)
    model.hf_quantizer.given_state = state_dict
    try:
        with _checksums(model):
            save(model, save_directory, is_main_process, state_dict, **kwargs)
    finally:
        model.hf_quantizer.given_state = None
        if not own_code:
            del model.config.auto_map
    complete_config(folder)
    if push_to_hub:
        _push(folder, token=kwargs.get("token"), tags=model.model_tags, **hub)


_MODEL_FILES = (
    *("README.md", f"{REMOTE_MODULE}.py", "config.json", "generation_config.json"),
    "model.safetensors.index.json",
)


def _push(
    folder: Path,
    *,
    token: str | bool | None,
    tags: Sequence[str] | None,
    repo_id: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    private: bool | None = None,
) -> None:
    """Uploads what a model consists of, in one commit; Transformers itself would do so before the checksums."""
    from huggingface_hub import HfApi, ModelCard, ModelCardData

    api = HfApi(token=token)
    repo = api.create_repo(repo_id or folder.resolve().name, private=private, exist_ok=True).repo_id
    if not (folder / "README.md").exists():
        data = ModelCardData(library_name="transformers", tags=[*(tags or ()), "basis-sharing"])
        ModelCard(f"---\n{data.to_yaml()}\n---\n").save(folder / "README.md")
    api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        commit_message=commit_message or "Upload model",
        create_pr=create_pr,
        allow_patterns=[*_MODEL_FILES, *(file.name for file in folder.glob("model*.safetensors"))],
    )


# What a compressed model does otherwise than its class, which refuses a change of dtype to any quantized model.
_METHODS: dict[str, Callable[..., Any]] = {
    "save_pretrained": save_pretrained,
    "half": nn.Module.half,
    "float": nn.Module.float,
}


def _declare_terms(model: Any) -> None:
    """Writes into the groups the rank of their layers' own terms, as it is now: adapters may have been merged.

    The layers of a group have terms of one rank, at most the full one: those of a lower rank are filled with zeros.
    """
    for group in model.config.quantization_config.groups:
        members = {name: model.get_submodule(name) for name in _local_names(model, group)}
        most = max(_term_rank(layer) for layer in members.values())
        full = min(s for m in members.values() for s in (m.in_features, m.out_features))
        for name, layer in members.items():
            if _term_rank(layer) > full:
                whole, is_low = layer.weight @ layer.down, layer.out_features == full
                one = torch.eye(full)
                layer = layer.shared.with_term(whole, one) if is_low else layer.shared.with_term(one, whole)
            if (lacking := min(most, full) - _term_rank(layer)) > 0:
                down, up = torch.zeros(lacking, layer.in_features), torch.zeros(layer.out_features, lacking)
                layer = layer.with_term(down, up)
            if layer is not members[name]:
                model.set_submodule(name, layer)
        group.pop("correction", None)
        if most:
            group["correction"] = min(most, full)
    model.hf_quantizer.declare_ties(model)


def _term_rank(layer: Any) -> int:
    return layer.down.shape[0] if isinstance(layer, CorrectedLinear) else 0


# In a group's entry of a saved config.json: CRC-32 of what its layers keep besides their factors, as 8 hex digits.
CHECKSUM = "kept_crc32"


@contextmanager
def _checksums(model: Any) -> Iterator[None]:
    """The checksums of the groups' kept buffers in the configuration, for as long as it is written."""
    groups = model.config.quantization_config.groups
    for group in groups:
        if (found := _checksum(_factorised(model, _local_names(model, group))[0])) is not None:
            group[CHECKSUM] = found
    try:
        yield
    finally:
        for group in groups:
            group.pop(CHECKSUM, None)


def kept_of(layer: FactorisedLinear) -> dict[str, Tensor]:
    """The buffers that a layer saves, by name."""
    return {name: value for name, value in layer.named_buffers(recurse=False) if name in layer.state_dict()}


def _checksum(layer: FactorisedLinear) -> str | None:
    """Of the bytes of all kept buffers, in the order of their names; None without any, or where they are offloaded."""
    kept = kept_of(layer)
    if not kept or any(value.is_meta for value in kept.values()):
        return None
    value = 0
    for name in sorted(kept):
        value = zlib.crc32(canonical(kept[name].cpu()).reshape(-1).view(torch.uint8).numpy().tobytes(), value)
    return f"{value:08x}"


# In the quantization_config of a saved config.json: CRC-32 by the name of each file of weights, as 8 hex digits, and
# that of config.json itself. Here and not in the files: whoever saves a model writes config.json anew, so none is old.
FILE_CHECKSUMS = "crc32"
_CONFIG_FILE = "config.json"
_BLOCK = 2**20


# Of a configuration: the file of weights that Transformers is to read in place of the usual ones.
_WEIGHTS_FILE = "transformers_weights"


def complete_config(folder: Path) -> None:
    """Checksums of all weights in the folder into config.json, and a word for who lacks the plug-in.

    To be done again where files of weights are written after the model itself was saved.
    """
    path = folder / _CONFIG_FILE
    found = {file.name: _file_checksum(file) for file in sorted(folder.glob("model*.safetensors"))}
    data = json.loads(path.read_text(encoding="utf-8"))
    if _is_own_auto_map(data.get("auto_map")):
        data[_WEIGHTS_FILE] = _word_without_plugin(data["auto_map"])
    data["quantization_config"][FILE_CHECKSUMS] = found
    found[_CONFIG_FILE] = _config_checksum(data)
    whole = path.with_name(f"{_CONFIG_FILE}.new")
    whole.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    whole.replace(path)


def _word_without_plugin(auto_map: Mapping[str, str]) -> str:
    """What a process without the plug-in is told in place of the wrong shapes that it would find later.

    It is the name of a file that cannot be one, which Transformers quotes as it refuses it, before it reads any
    weights. Whoever has the plug-in never sees it: the quantizer takes it out of the configuration.
    """
    auto = next((name for name in auto_map if name != "AutoConfig"), "AutoModel")
    return (
        f"none, for the weights are stored as factors. Load this model with {auto}.from_pretrained(..., "
        "trust_remote_code=True), or install bs_exp"
    )


def check_files(files: Sequence[str | os.PathLike[str]], checksums: Mapping[str, str]) -> None:
    """ValueError if one of the files that were read, or config.json beside them, is not what was saved.

    All bytes are read for that, so what is found is independent of the dtype and the devices that are asked for. Files
    that config.json does not name are not looked at: other tools wrote them.
    """
    for path in map(Path, files):
        if path.name in checksums:
            _compare(path, _file_checksum(path), checksums[path.name])
    config = Path(files[0]).with_name(_CONFIG_FILE) if files else None
    if config is not None and _CONFIG_FILE in checksums and config.is_file():
        _compare(config, _config_checksum(json.loads(config.read_text(encoding="utf-8"))), checksums[_CONFIG_FILE])


def _compare(path: Path, found: str, saved: str) -> None:
    if found != saved:
        raise ValueError(
            f"{path} is damaged, or was changed after the model was saved: its checksum is {found}, in config.json it "
            f"is {saved}. Copy or download the folder again. If the change was meant, remove {FILE_CHECKSUMS!r} from "
            "quantization_config in config.json."
        )


def _file_checksum(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def _config_checksum(data: Mapping[str, Any]) -> str:
    """Of what a config.json says, however it is laid out, without this checksum."""
    section = data["quantization_config"]
    others = {name: value for name, value in section[FILE_CHECKSUMS].items() if name != _CONFIG_FILE}
    said = {**data, "quantization_config": {**section, FILE_CHECKSUMS: others}}
    return f"{zlib.crc32(json.dumps(said, sort_keys=True).encode()):08x}"


class BasisSharingAutoConfig:
    """`auto_map` entry for AutoConfig: being imported it has registered the plug-in; the config is the native one."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: the saved config is of a native class."""

    @classmethod
    def from_pretrained(cls, folder: Any, **kwargs: Any) -> Any:
        from transformers import AutoConfig

        kwargs.pop("trust_remote_code", None)
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **kwargs)


class _NativeModel:
    """`auto_map` entry for an Auto class: the model comes back as its native class."""

    auto_class: ClassVar[str]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: the saved model is of a native class."""

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("trust_remote_code", None)
        return _auto_class(cls).from_pretrained(folder, *args, trust_remote_code=False, **kwargs)


class BasisSharingForCausalLM(_NativeModel):
    auto_class = "AutoModelForCausalLM"


class BasisSharingForMaskedLM(_NativeModel):
    auto_class = "AutoModelForMaskedLM"


class BasisSharingForSeq2SeqLM(_NativeModel):
    auto_class = "AutoModelForSeq2SeqLM"


class BasisSharingForTextEncoding(_NativeModel):
    auto_class = "AutoModelForTextEncoding"


class BasisSharingModel(_NativeModel):
    auto_class = "AutoModel"


_NATIVE_MODELS = (
    BasisSharingForCausalLM,
    BasisSharingForMaskedLM,
    BasisSharingForSeq2SeqLM,
    BasisSharingForTextEncoding,
    BasisSharingModel,
)


def auto_map(model: Any) -> dict[str, str]:
    """The `auto_map` of a saved model: an entry for its configuration, and for every Auto class that has its class."""
    config = type(model.config)
    entries = {"AutoConfig": f"{REMOTE_MODULE}.{BasisSharingAutoConfig.__name__}"}
    for native in _NATIVE_MODELS:
        known = _auto_class(native)._model_mapping.get(config, ())
        if type(model) in (known if isinstance(known, tuple) else (known,)):
            entries[native.auto_class] = f"{REMOTE_MODULE}.{native.__name__}"
    return entries


def _auto_class(native: type[_NativeModel]) -> Any:
    return getattr(transformers, native.auto_class)


def _is_own_auto_map(entries: Mapping[str, str] | None) -> bool:
    """Whether a configuration names this file's entries; from the hub they are prefixed by the repository's name."""
    names = [entry.rpartition("--")[2] for entry in (entries or {}).values()]
    return bool(names) and all(name.startswith(f"{REMOTE_MODULE}.") for name in names)


# peft's module of LoRA models. It asks its own list of layer types what to make of a module, and lets nobody add one.
_PEFT_LORA = "peft.tuners.lora.model"
# How an adapter may begin; the other ways decompose the dense weight, which a factorised layer lacks.
_STARTS = (True, False, "gaussian", "orthogonal", "eva")


@cache
def _lora_class() -> type[nn.Module]:
    """peft's LoRA layer on a factorised one. Made when it is asked for: peft may be missing."""
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.tuners_utils import check_adapters_to_merge

    class FactorisedLora(LoraLinear):
        """`y = layer(x) + scaling * (x @ A^T) @ B^T`, which merging makes a term of the layer's own: see `with_term`.

        So a shared basis is never touched, and taking an adapter out again gives the layer back to the bit.
        """

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
            layer = cast("FactorisedLinear | CorrectedLinear", module)
            return layer.in_features, layer.out_features

        @property
        def lora_variants(self) -> dict[tuple[str, ...], Any]:
            return {(): None}

        def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
            asked = {"use_dora": config.use_dora, "lora_bias": config.lora_bias}
            if config.init_lora_weights not in _STARTS:
                asked["init_lora_weights"] = config.init_lora_weights
            if wrong := [f"{name}={value!r}" for name, value in asked.items() if value]:
                raise ValueError(
                    f"{kwargs.get('target_name')} is stored as two factors, so an adapter of it cannot have "
                    f"{', '.join(wrong)}: the dense weight or a bias of its own is not there. Leave use_dora and "
                    f"lora_bias out, and set init_lora_weights to one of {', '.join(map(str, _STARTS))}. Or make the "
                    "model dense first (bs_exp.to_dense)."
                )
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
            self.fan_in_fan_out = False  # the factors of a Conv1D layer are [out, in], too

        @property
        def _layer(self) -> Any:
            return self.base_layer

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            for name in check_adapters_to_merge(self, adapter_names):
                if name not in self.lora_A:
                    continue
                down, up = (cast("Tensor", part[name].weight).detach() for part in (self.lora_A, self.lora_B))
                up = up.double() * self.scaling[name]
                if safe_merge and not (down.isfinite().all() and up.isfinite().all()):
                    raise ValueError(f"The adapter {name} has NaN or infinite values, so it is not merged.")
                self.base_layer = self._layer.with_term(down, up)
                self.merged_adapters.append(name)

        def unmerge(self) -> None:
            while self.merged_adapters:
                self.base_layer = self._layer.without_term(self.r[self.merged_adapters.pop()])

    return FactorisedLora


def _tell_peft() -> None:
    """Has peft put adapters on factorised layers by their usual names, from now on or as soon as it is imported."""
    module = sys.modules.get(_PEFT_LORA)
    if module is not None:
        _extend(module)
    elif not any(type(finder).__name__ == PeftFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, PeftFinder())


def _extend(module: Any) -> None:
    model = getattr(module, "LoraModel", None)
    if model is None or hasattr(model._create_new_module, "asks_layers"):
        return
    usual = model._create_new_module

    def create(config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        # A target can be a tuner's layer itself. Copies of this file know their own classes: the layers are asked.
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if not hasattr(base, "lora_layer") or kwargs.get("parameter_name") is not None:
            return usual(config, adapter_name, target, **kwargs)
        if target is not base:
            raise ValueError(
                f"{kwargs.get('target_name')} is adapted twice in one model: by its name and by a Parameter of it "
                "(target_parameters). Choose one of them."
            )
        return base.lora_layer(base, adapter_name, config=config, **kwargs)

    create.asks_layers = True  # type: ignore[attr-defined]
    model._create_new_module = staticmethod(create)


class PeftFinder:
    """Finds one module of peft, as the other finders do, and extends it after it was executed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != _PEFT_LORA:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _extend(module)
                sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != PeftFinder.__name__]

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _linear_layers(
    dense: Sequence[nn.Module], members: Sequence[str]
) -> tuple[list[nn.Linear | Conv1D], list[tuple[int, int]]]:
    """The dense layers of a group and their (d_in, d_out); raises ValueError unless all read inputs of one size."""
    shapes = [_shape(layer, name) for layer, name in zip(dense, members, strict=True)]
    if len({d_in for d_in, _ in shapes}) != 1:
        raise ValueError(
            f"The members of a group must read inputs of one size, got (d_in, d_out) = {_shown(shapes)} for "
            f"{_shown(members)}. The quantization_config does not fit this model."
        )
    return cast("list[nn.Linear | Conv1D]", dense), shapes


def _shape(layer: nn.Module, name: str) -> tuple[int, int]:
    """(d_in, d_out) of a dense layer."""
    # Also known to models/architecture.py, which this file cannot import.
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    raise ValueError(
        f"{name} is a {type(layer).__name__}, but only nn.Linear and Conv1D layers can be factorised. "
        "The quantization_config does not fit this model."
    )


def _local_names(model: Any, group: Mapping[str, Any]) -> list[str]:
    """Module names of a group's members inside `model`, which may be the saved model without its head."""
    head = f"{model.base_model_prefix}."
    names = []
    for name in group["members"]:
        candidates = (name, name.removeprefix(head))
        found = next((c for c in candidates if _has_module(model, c)), None)
        if found is None:
            raise ValueError(
                f"{type(model).__name__} has no module {name!r}. The quantization_config does not fit this model."
            )
        names.append(found)
    return names


def _patterns(ties: Mapping[str, str]) -> dict[str, str]:
    """The names of ties as patterns that match them where modules are wrapped, too.

    peft calls these `base_layer`, and a layer with a term of its own calls the rest of it `shared`.
    """

    def pattern(name: str) -> str:
        parts = name.replace(".shared.", ".").split(".")
        return r"(\.base_layer|\.shared)*\.".join(map(re.escape, parts)) + "$"

    return {pattern(peer): pattern(owner) for peer, owner in ties.items()}


def _factorised(model: Any, names: Sequence[str]) -> list[FactorisedLinear]:
    """The factorised layers of the named modules; those in front of a layer's own correction included."""
    modules = [model.get_submodule(name) for name in names]
    layers = [module.shared if isinstance(module, CorrectedLinear) else module for module in modules]
    return [layer for layer in layers if isinstance(layer, FactorisedLinear)]


def _tensors_of(model: Any, name: str) -> list[str]:
    """Names of all tensors that a module saves."""
    return [f"{name}.{key}" for key in model.get_submodule(name).state_dict()]


def _settle(layers: Sequence[FactorisedLinear], group: Mapping[str, Any]) -> None:
    """Reads what a group's layers keep, now that it is there: all keep the same, since they share a basis."""
    for layer in layers:
        layer.refresh()
        for name, value in kept_of(layer).items():
            both = value, kept_of(layers[0])[name]
            if not (any(b.is_meta for b in both) or torch.equal(*(b.cpu() for b in both))):
                raise ValueError(
                    f"The layers {list(group['members'])} share a basis, but their `{name}` differ: the file is "
                    "damaged."
                )
    if group.get(CHECKSUM) is not None:
        found = _checksum(layers[0])
        if found is not None and found != group[CHECKSUM]:
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in kept_of(layers[0]))} of the layers {list(group['members'])}: the "
                f"checksum is {found}, in config.json it is {group[CHECKSUM]}. The file of the weights is damaged, or "
                "belongs to another config.json."
            )


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


# What configuration classes call the number of blocks.
_DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    *("num_decoder_layers", "encoder_layers", "decoder_layers"),
)


def _check_groups(groups: Any) -> None:
    if not isinstance(groups, list | tuple):
        raise ValueError(f"quantization_config.groups must be a list of groups, got {_shown(groups)}.")
    seen: set[str] = set()
    for group in groups:
        if not _is_group(group):
            raise ValueError(
                "Each of quantization_config.groups needs `members` (a list of module names) and `rank` (a whole "
                f"number of at least 1), and may have a `correction` (likewise), got {_shown(group)}."
            )
        for name in group["members"]:
            if name in seen:
                raise ValueError(f"quantization_config.groups names {name!r} twice; a module belongs to one group.")
            seen.add(name)
        _check_count("groups", len(seen))


def _check_count(what: str, count: int) -> None:
    if count > MOST_MODULES:
        raise ValueError(f"quantization_config.{what} must name at most {MOST_MODULES} modules, got {count} or more.")


def _is_group(group: Any) -> bool:
    if not isinstance(group, Mapping) or group.keys() - {"members", "rank", "correction", CHECKSUM}:
        return False
    members = group.get("members")
    return (
        isinstance(members, list | tuple)
        and bool(members)
        and all(isinstance(name, str) for name in members)
        and _is_count(group.get("rank"))
        and type(group.get("correction", 0)) is int
        and group.get("correction", 0) >= 0
        and isinstance(group.get(CHECKSUM, ""), str)
    )


def _checked_sums(sums: Any) -> dict[str, str]:
    if not isinstance(sums, Mapping) or not all(isinstance(text, str) for item in sums.items() for text in item):
        raise ValueError(f"quantization_config.{FILE_CHECKSUMS} must map names of files to texts, got {_shown(sums)}.")
    return dict(sums)


BITS = (3, 4, 8)


def checked_precision(precision: Any) -> dict[str, Any]:
    """The entry of a configuration that says in how many bits matrices are stored; ValueError if it is none."""
    if (
        not isinstance(precision, Mapping)
        or precision.keys() != set(Precision._fields)
        or type(precision["bits"]) is not int
        or precision["bits"] not in BITS
        or not (precision["group_size"] is None or _is_count(precision["group_size"]))
        or type(precision["symmetric"]) is not bool
    ):
        raise ValueError(
            f"quantization_config.precision needs `bits` ({', '.join(map(str, BITS))}), `group_size` (a whole number "
            f"of at least 1, or null) and `symmetric` (true or false), got {_shown(precision)}."
        )
    return dict(precision)


def _checked_names(what: str, names: Any) -> list[str]:
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"quantization_config.{what} must be a list of module names, got {_shown(names)}.")
    _check_count(what, len(names))
    if len(set(names)) < len(names):
        raise ValueError(f"quantization_config.{what} names a module twice.")
    return list(names)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _checked_splits(splits: Any) -> list[dict[str, Any]]:
    if not isinstance(splits, list | tuple):
        raise ValueError(f"quantization_config.splits must be a list of splits, got {_shown(splits)}.")
    _check_count("splits", len(splits))
    seen: set[str] = set()
    for split in splits:
        if not _is_split(split):
            raise ValueError(
                "Each of quantization_config.splits needs `module` (a name), `axis` (in or out) and `sizes` (of two "
                f"blocks at least), got {_shown(split)}."
            )
        if split["module"] in seen:
            raise ValueError(f"quantization_config.splits names {split['module']!r} twice; a module is cut once.")
        seen.add(split["module"])
    return [{**split, "sizes": list(split["sizes"])} for split in splits]


def _is_split(split: Any) -> bool:
    if not isinstance(split, Mapping) or split.keys() != {"module", "axis", "sizes"}:
        return False
    sizes = split["sizes"]
    return (
        isinstance(split["module"], str)
        and isinstance(split["axis"], str)
        and isinstance(sizes, list | tuple)
        and len(sizes) > 1
        and all(_is_count(size) for size in sizes)
    )


def _shown(value: object) -> str:
    """A value of a file in a message, cut short if it is long."""
    text = repr(value if not isinstance(value, list | tuple) or len(value) <= 8 else [*value[:8], "..."])
    return text if len(text) <= 400 else f"{text[:400]} ..."


def register() -> None:
    """Make Transformers know the method. The first copy of this file stays, unless another reads a newer format."""
    known: Any = AUTO_QUANTIZER_MAPPING.get(METHOD)
    if known is not None:
        if known.format_version >= FORMAT_VERSION:
            return
        del AUTO_QUANTIZER_MAPPING[METHOD], AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD]
    register_quantization_config(METHOD)(BasisSharingConfig)
    register_quantizer(METHOD)(BasisSharingQuantizer)


register()
