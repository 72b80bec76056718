"""The matrices of a model, found in its modules and named by `roles.yaml`; no model class is named here.

This is the only file that knows that `nn.Linear` stores the transpose of `W[d_in, d_out]` and that `Conv1D` does not.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources

import torch
import yaml
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bs_exp.errors import ConfigError, ModelError
from bs_exp.models.modeling_basis_sharing import can_unfuse
from bs_exp.types import Architecture, WeightMatrix
from bs_exp.validation import shown

Roles = Mapping[str, str]
"""Dotted suffix of a linear layer's name inside its block (`*` stands for one part) -> matrix type, or `dense`."""

DENSE = "dense"


@dataclass(frozen=True)
class _LinearLayer:
    """A linear layer of a block: `name` is its path inside the block, `path` from the model down."""

    name: str
    path: str
    layer: int
    stack: int
    module: nn.Linear | Conv1D

    @property
    def pattern(self) -> str:
        """The path with `*` for every number except a last one: it is the same for all layers."""
        return re.sub(r"(?<=\.)\d+(?=\.)", "*", self.path)

    @property
    def suffix(self) -> str:
        """The name inside the block with `*` for every number except a last one, as `model.roles` takes it."""
        # A number at the end is a position in an nn.Sequential: each of its modules has a role of its own.
        *parts, last = self.name.split(".")
        return ".".join([*("*" if part.isdigit() else part for part in parts), last])

    @property
    def shape(self) -> tuple[int, int]:
        d_in, d_out = _as_in_out(self.module).shape
        return d_in, d_out


@dataclass(frozen=True)
class RoleTable:
    """The meaning of names: matrix type -> input site, and name suffix -> matrix type; the user's `own` comes first."""

    sites: Mapping[str, str]
    names: Roles
    own: Roles

    def __post_init__(self) -> None:
        if not isinstance(self.own, Mapping):
            raise ConfigError(
                f"model.roles must map names to matrix types, such as {{q_proj: q}}, got {shown(self.own)}."
            )
        for suffix, matrix in {**self.names, **self.own}.items():
            if matrix not in (*self.sites, DENSE):
                raise ConfigError(
                    f"model.roles: {suffix!r} is mapped to {matrix!r}, which is no matrix type. "
                    f"Matrix types: {' '.join(self.sites)}; {DENSE!r} leaves a layer as it is."
                )

    def role_of(self, name: str) -> str | None:
        """Matrix type (or `dense`) of the longest matching suffix, None if nothing matches."""
        for table in (self.own, self.names):
            matching = [suffix for suffix in table if _ends_with(name, suffix)]
            if matching:
                # More parts win, then fewer wildcards.
                return table[max(matching, key=lambda suffix: (suffix.count("."), -suffix.count("*")))]
        return None


def read_roles(own: Roles | None = None) -> RoleTable:
    """The table of `roles.yaml`, with the user's own mapping in front."""
    data = _roles_file()
    return RoleTable(sites=data["sites"], names=data["names"], own={} if own is None else own)


@cache
def _roles_file() -> Mapping[str, Mapping[str, str]]:
    text = resources.files("bs_exp.models").joinpath("roles.yaml").read_text(encoding="utf-8")
    data: Mapping[str, Mapping[str, str]] = yaml.safe_load(text)
    return data


def find_architecture(model: PreTrainedModel, roles: Roles | None = None) -> Architecture:
    """The compressible matrices of a language model, by layer.

    Blocks are the members of the outermost lists of modules that hold linear layers. They are numbered through all
    lists, those of a decoder after those of its encoder. Every linear layer of a block needs a role, so that none is
    left out unnoticed. Embeddings, norms and the head lie outside the blocks or are no linear layers.
    Raises ModelError if there are no such layers, if roles are missing or ambiguous, or if a weight is quantised or
    used in several places. Modules that hold all experts of a block as tensors are `fused`, unless their own name has
    the role `dense`.
    """
    table = read_roles(roles)
    family = str(model.config.model_type)
    found = [(layer, table.role_of(layer.name)) for layer in _linear_layers(model)]
    if not found:
        raise ModelError(
            f"{type(model).__name__} (model type {family!r}) holds no list of blocks with nn.Linear or Conv1D layers, "
            "so there is nothing to compress."
        )
    mixtures = list(_mixtures(model))
    if problem := _problem(found, table, mixtures):
        what, unclear = problem
        raise ModelError(
            f"{type(model).__name__} (model type {family!r}): {what}.\n{_role_help(found, table, sorted(unclear))}"
        )
    _require_plain(model, [layer for layer, role in found if role != DENSE])
    order = {matrix: position for position, matrix in enumerate(table.sites)}
    matrices = [
        WeightMatrix(role, layer.layer, table.sites[role], layer.path, *layer.shape, layer.stack)
        for layer, role in found
        if role is not None and role != DENSE
    ]
    return Architecture(
        family=family,
        matrices=tuple(sorted(matrices, key=lambda m: (m.layer, order[m.matrix]))),
        untouched=tuple(_untouched(model, {m.module for m in matrices})),
        blocks=tuple(path for _, path, _ in _blocks(model)),
        fused=tuple(path for path in mixtures if table.role_of(path) != DENSE),
    )


def module_of(model: nn.Module, matrix: WeightMatrix) -> nn.Linear | Conv1D:
    """The dense layer that stores a matrix; ModelError if it was replaced before."""
    module = model.get_submodule(matrix.module)
    if not isinstance(module, nn.Linear | Conv1D):
        raise ModelError(f"{matrix.module} is a {type(module).__name__}, not a dense layer; was it compressed before?")
    return module


def weight_of(model: nn.Module, matrix: WeightMatrix) -> Float[Tensor, "d_in d_out"]:
    """The matrix `W` of `y = x @ W`, a view of the stored weight in its own dtype and on its own device."""
    return _as_in_out(module_of(model, matrix))


def trunks(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The transformer without its head, which runs the blocks and computes no logits: one part, or encoder and decoder.

    A model of one part without a head is its own trunk. The parts of some encoder-decoders are plain modules, which run
    inside their model only. Raises ModelError if no part without the head is found.
    """
    if model.config.is_encoder_decoder:
        return model.get_encoder(), _without_head(model.get_decoder())
    decoder = model.get_decoder()
    # Some encoders call the last layer of their head a decoder, others the last of their blocks.
    return (_without_head(decoder if _holds(decoder, nn.ModuleList, nn.Embedding) else model),)


def _without_head(model: nn.Module) -> nn.Module:
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        return model
    trunk: nn.Module | None = model.base_model
    if trunk is model:
        trunk = _part_without_head(model)
    if trunk is None:
        raise ModelError(
            f"{type(model).__name__} has no part without a language-model head: neither get_decoder() nor "
            "base_model_prefix names one, and no submodel holds its embeddings and its blocks, so its inputs cannot be "
            "calibrated without computing logits."
        )
    return trunk


def _part_without_head(model: PreTrainedModel) -> nn.Module | None:
    """The submodel that holds the token embeddings and the blocks, but not the head; None if there is none."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    for part in model.modules():
        if part is not model and isinstance(part, PreTrainedModel) and _holds(part, nn.ModuleList):
            held = set(part.modules())
            if embeddings in held and head not in held:
                return part
    return None


def _holds(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    return module is not None and all(any(isinstance(part, kind) for part in module.modules()) for kind in kinds)


def _as_in_out(module: nn.Linear | Conv1D) -> Tensor:
    weight: Tensor = module.weight
    return weight if isinstance(module, Conv1D) else weight.T


def _ends_with(name: str, suffix: str) -> bool:
    parts, tail = name.split("."), suffix.split(".")
    return len(tail) <= len(parts) and all(map(fnmatchcase, parts[-len(tail) :], tail))


def _blocks(model: PreTrainedModel) -> Iterator[tuple[int, str, nn.Module]]:
    """For every block, in order: the number of its trunk, its path from the model down, and the block itself."""
    for part, trunk in enumerate(trunks(model)):
        prefix = next(name for name, module in model.named_modules() if module is trunk)
        chosen: list[str] = []
        for name, stack in trunk.named_modules(prefix=prefix):
            nested = any(name.startswith(f"{outer}.") for outer in chosen)
            if isinstance(stack, nn.ModuleList) and not nested and any(map(_is_block, stack)):
                chosen.append(name)
                yield from ((part, f"{name}.{index}", block) for index, block in enumerate(stack))


def _is_block(module: nn.Module) -> bool:
    # A list of bare linear layers (projections per layer, several heads) is not a stack, and one of stacks holds them.
    return not isinstance(module, nn.Linear | Conv1D | nn.ModuleList) and any(
        isinstance(part, nn.Linear | Conv1D) for part in module.modules()
    )


def _linear_layers(model: PreTrainedModel) -> Iterator[_LinearLayer]:
    for layer, (stack, path, block) in enumerate(_blocks(model)):
        for name, module in block.named_modules(remove_duplicate=False):
            if isinstance(module, nn.Linear | Conv1D):
                yield _LinearLayer(name, f"{path}.{name}", layer, stack, module)


def _mixtures(model: PreTrainedModel) -> Iterator[str]:
    """Paths of the modules that hold all experts of a block as tensors, and that can be taken apart."""
    for _, path, block in _blocks(model):
        for name, module in block.named_modules(prefix=path):
            if can_unfuse(module):
                yield name


def _untouched(model: PreTrainedModel, targeted: set[str]) -> Iterator[str]:
    """Names of the blocks' parameters with at least two axes (fused experts, routers, convolutions) without a role."""
    for _, path, block in _blocks(model):
        for name, parameter in block.named_parameters(prefix=path):
            if parameter.ndim > 1 and name.rpartition(".")[0] not in targeted:
                yield name


def _problem(
    found: Sequence[tuple[_LinearLayer, str | None]], table: RoleTable, mixtures: Sequence[str] = ()
) -> tuple[str, set[str]] | None:
    """What is wrong with the roles found, and the suffixes of the layers that need a role; None if nothing is.

    Every linear layer needs a role, no two of a block the same, and one at least a matrix type.
    """
    counts = Counter((layer.layer, role) for layer, role in found if role is not None and role != DENSE)
    if not counts and all(role == DENSE for _, role in found):
        every = {layer.suffix for layer, _ in found}
        return "every linear layer is marked as dense, so nothing is left to compress", every
    if unknown := {layer.suffix for layer, role in found if role is None}:
        return f"no role is known for the linear layers {', '.join(sorted(unknown))}", unknown
    if twice := {layer.suffix for layer, role in found if role is not None and counts[layer.layer, role] > 1}:
        return f"several linear layers of one block have the same role: {', '.join(sorted(twice))}", twice
    names = [*(layer.name for layer, _ in found), *mixtures]
    if idle := [suffix for suffix in table.own if not any(_ends_with(name, suffix) for name in names)]:
        what = f"model.roles names {', '.join(idle)}, which no linear layer ends with"
        return f"{what}: leave it out, or name a layer of these", set()
    return None


def _role_help(found: Sequence[tuple[_LinearLayer, str | None]], table: RoleTable, unclear: Sequence[str]) -> str:
    """All linear layers found, as text, and how to set the types of the unclear ones, which only the user knows."""
    rows = {
        f"  {layer.pattern}  {type(layer.module).__name__}  {layer.shape[0]} -> {layer.shape[1]}": role or "?"
        for layer, role in found
    }
    width = max(map(len, rows))
    listed = "Linear layers of its blocks, and their matrix types:\n" + "\n".join(
        f"{row:<{width}}  {role}" for row, role in rows.items()
    )
    if not unclear:
        return listed
    clear = [layer.name for layer, _ in found if layer.suffix not in unclear]
    said = {suffix: role for suffix, role in table.own.items() if any(_ends_with(name, suffix) for name in clear)}
    roles = [f"{suffix}: {matrix}" for suffix, matrix in {**said, **dict.fromkeys(unclear, "TYPE")}.items()]
    return (
        f"{listed}\nSay what they are by the end of their names, in YAML:\n"
        "  model:\n    roles:\n" + "".join(f"      {role}\n" for role in roles) + "or on the command line:\n"
        f"  'model.roles={{{', '.join(roles)}}}'\n"
        f"TYPE is what the layer does: {' '.join(table.sites)}; or {DENSE!r}, which leaves it as it is."
    )


def _require_plain(model: PreTrainedModel, layers: Sequence[_LinearLayer]) -> None:
    """ModelError unless the targeted weights are ordinary floating-point matrices of one dtype, each used once."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    for layer in layers:
        weight = layer.module.weight
        if not weight.is_floating_point() or weight.ndim != 2:
            raise ModelError(
                f"{layer.path} ({type(layer.module).__name__}) stores {weight.dtype} values of shape "
                f"{tuple(weight.shape)}: the model is quantised. Load the checkpoint it was made from."
            )
        if len(owners := names[id(weight)]) > 1:
            raise ModelError(
                f"One weight is used in several places: {', '.join(owners)}. Layers that already share their weights "
                f"cannot be compressed apart; map them to {DENSE!r} in model.roles, or untie them first."
            )
    _require_one_dtype(model, layers)


def _require_one_dtype(model: PreTrainedModel, layers: Sequence[_LinearLayer]) -> None:
    """ModelError if weights have several dtypes, apart from those that Transformers itself keeps in fp32."""
    apart = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    by_dtype: dict[torch.dtype, list[str]] = defaultdict(list)
    for layer in layers:
        if not any(f".{name}." in f".{layer.path}." for name in apart):
            by_dtype[layer.module.weight.dtype].append(layer.path)
    if len(by_dtype) > 1:
        named = [
            f"{str(dtype).removeprefix('torch.')} in {len(paths)}, such as {paths[0]}"
            for dtype, paths in by_dtype.items()
        ]
        raise ModelError(
            f"The weights that are compressed have several dtypes: {'; '.join(named)}. Convert the whole model, as in "
            "model.to(torch.float32)."
        )
