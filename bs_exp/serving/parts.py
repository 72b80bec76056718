"""Which stored matrices make up a layer of a server, and what of them one process of several holds. No server needed.

Servers fuse matrices that read one input (q, k, v; gate, up) into one layer, and split layers between devices by their
outputs (column-parallel) or their inputs (row-parallel). A matrix is `[d_out, d_in]` here, as it is stored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bs_exp.models.modeling_basis_sharing import (
    CHECKSUM,
    FORMAT_VERSION,
    LAYOUTS,
    BasisSharingConfig,
    FactorisedLinear,
    PivotedInputLinear,
)


@dataclass(frozen=True)
class StoredGroup:
    """A group of a saved model: its `members` (names of modules; the first owns the basis) hold one basis."""

    members: tuple[str, ...]
    rank: int
    correction: int
    kind: type[FactorisedLinear]
    checksum: str | None


def read_groups(quantization_config: Mapping[str, Any]) -> tuple[StoredGroup, ...]:
    """The groups that a `quantization_config` declares; ValueError for what a server cannot hold, or nobody reads."""
    version = quantization_config.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"This folder is stored in format version {version} of basis_sharing, the installed bs_exp serves version "
            f"{FORMAT_VERSION}. Install the bs_exp that wrote it beside the server, or save the model anew: load it "
            "with from_pretrained(.., trust_remote_code=True) and give it to bs_exp.save_model."
        )
    config = BasisSharingConfig(**quantization_config)
    if splits := getattr(config, "splits", ()):
        raise ValueError(
            f"This folder stores {len(splits)} matrices cut into blocks (such as {splits[0]['module']}), which no "
            "server takes. Compress without a view of heads, or serve the dense model: bs_exp.to_dense."
        )
    if experts := getattr(config, "experts", ()):
        raise ValueError(
            f"This folder stores the experts of {len(experts)} modules one by one (such as {experts[0]}), which only "
            "Transformers loads so far. Compress with model.roles={experts: dense}, or serve the dense model: bs-exp "
            "export FOLDER --to dense."
        )
    if (precision := config.stored_precision) is not None:
        raise ValueError(
            f"This folder stores its matrices in {precision.bits} bits (precision=int{precision.bits}), which only "
            "Transformers loads so far. Serve a folder that was compressed with precision=none, or the dense model: "
            "bs-exp export FOLDER --to dense."
        )
    return tuple(
        StoredGroup(
            members=tuple(group["members"]),
            rank=group["rank"],
            correction=group.get("correction", 0),
            kind=LAYOUTS[config.layout](len(group["members"])),
            checksum=group.get(CHECKSUM),
        )
        for group in config.groups
    )


def renamed(groups: Sequence[StoredGroup], names: Callable[[str], str | None]) -> tuple[StoredGroup, ...]:
    """The groups by the names that a server gives to modules; a module that it does not build keeps its own."""
    return tuple(replace(g, members=tuple(names(member) or member for member in g.members)) for g in groups)


@dataclass(frozen=True)
class Part:
    """One stored matrix of a layer, factorised in a group or dense; `segments` are the outputs of the layer it makes.

    A layer of a server has a list of outputs, such as those of q, k and v. Where they are stored as three matrices,
    each makes one; a matrix that is stored fused makes all of them.
    """

    name: str
    group: StoredGroup | None
    segments: tuple[int, ...]


def parts_of(
    layer: str, segments: int, groups: Sequence[StoredGroup], fused: Mapping[str, Sequence[str]]
) -> tuple[Part, ...] | None:
    """The stored matrices of a layer with so many outputs, in their order; None if all of them are dense.

    `fused` has the last part of a fused layer's name, and those of the matrices that it is stored as. ValueError if the
    numbers of matrices and of outputs do not fit.
    """
    found = {member: group for group in groups for member in group.members}
    if layer in found:
        return (Part(layer, found[layer], tuple(range(segments))),)
    stem, _, last = layer.rpartition(".")
    names = [f"{stem}.{name}" if stem else name for name in fused.get(last, ())]
    if not any(name in found for name in names):
        return None
    if len(names) != segments:
        raise ValueError(
            f"{layer} has {segments} outputs in the server, but is stored as {len(names)} matrices ({', '.join(names)})"
            ", and some of these are factorised. The server's layer is of a kind that is not known here."
        )
    return tuple(Part(name, found.get(name), (i,)) for i, name in enumerate(names))


def stacks(groups: Sequence[StoredGroup], fused: Mapping[str, Sequence[str]]) -> list[tuple[StoredGroup, ...]]:
    """Which of the groups of one layer have bases that are one product, stacked, in every layer that holds them.

    Bases can be stacked without a copy if they are of the same layers. One with pivots among its inputs stands alone:
    it reads inputs of its own.
    """
    found: dict[object, list[StoredGroup]] = {}
    for group in dict.fromkeys(groups):
        alone = issubclass(group.kind, PivotedInputLinear)
        found.setdefault(group if alone else _homes(group, fused), []).append(group)
    return [tuple(stack) for stack in found.values()]


def _homes(group: StoredGroup, fused: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """Names of the layers of the server that hold the group's members."""
    fused_into = {name: layer for layer, names in fused.items() for name in names}

    def home(member: str) -> str:
        stem, dot, last = member.rpartition(".")
        return f"{stem}{dot}{fused_into.get(last, last)}"

    return frozenset(map(home, group.members))


@dataclass(frozen=True)
class Share:
    """What of a matrix one process holds: which of its inputs, and which ranges of its outputs, one after the other."""

    inputs: slice
    outputs: tuple[slice, ...]
    d_in: int
    d_out: int

    @property
    def all_inputs(self) -> bool:
        return self.inputs == slice(0, self.d_in)

    @property
    def output_features(self) -> Tensor:
        """Numbers of the outputs that it holds, int64."""
        return torch.cat([torch.arange(part.start, part.stop) for part in self.outputs])

    def of_outputs(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor with one row per output of the matrix."""
        parts = [tensor[part] for part in self.outputs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def share(
    part: Part, *, full: Sequence[int], held: Sequence[int], d_in: int, d_in_held: int, rank: int, size: int
) -> Share:
    """The share of process `rank` of `size` in a part of a layer.

    `full` and `held` are the widths of the layer's outputs, in all and in one process. Where there are fewer pieces
    than processes (key and value heads), neighbours hold the same one.
    """
    ranges, offset = [], 0
    for segment in part.segments:
        pieces = full[segment] // held[segment]
        start = offset + (rank * pieces // size) * held[segment]
        ranges.append(slice(start, start + held[segment]))
        offset += full[segment]
    first = rank * d_in_held if d_in_held != d_in else 0
    return Share(slice(first, first + d_in_held), tuple(ranges), d_in, offset)


@dataclass(frozen=True)
class HeldFeatures:
    """Of a pivoted matrix: which pivots and which other features a process holds, and where they are among its own.

    `own` and `others` are places among the features that the process holds; `components` are the numbers of its pivots
    (rows of the basis), `rows` those of the others (rows of the coefficients, or columns of the basis). All int64.
    """

    own: Tensor
    others: Tensor
    components: Tensor
    rows: Tensor


def held_features(is_pivot: Tensor, features: Tensor) -> HeldFeatures:
    """What a process has of a pivoted side whose pivots are marked, if it holds these features (their numbers)."""
    held = is_pivot[features]
    component = is_pivot.cumsum(0)[features] - 1
    row = (~is_pivot).cumsum(0)[features] - 1
    return HeldFeatures(
        own=held.nonzero()[:, 0], others=(~held).nonzero()[:, 0], components=component[held], rows=row[~held]
    )


def check_stages(groups: Sequence[StoredGroup], starts: Sequence[int]) -> None:
    """ValueError if a group has members in several stages of a pipeline, which begin with the blocks `starts`."""
    for group in groups:
        stages = {member: _stage(member, starts) for member in group.members}
        if len(set(stages.values())) > 1:
            first, last = min(stages, key=stages.__getitem__), max(stages, key=stages.__getitem__)
            raise ValueError(
                f"{first} (stage {stages[first]} of the pipeline) and {last} (stage {stages[last]}) share a basis, so "
                "they must be in one process. Serve with pipeline_parallel_size=1 (tensor parallelism is fine), or "
                "choose stages that begin between groups (VLLM_PP_LAYER_PARTITION)."
            )


def _stage(member: str, starts: Sequence[int]) -> int:
    block = re.search(r"\.(\d+)\.", member)
    return sum(start <= int(block[1]) for start in starts) - 1 if block else 0
