"""What a server's layer of factorised matrices holds and computes: bases, which peers hold as one object, and parts.

Products go through the server's own method for dense layers, so they use the kernels that it has for the platform.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from bs_exp.models.modeling_basis_sharing import (
    PivotedInputLinear,
    PivotedLinear,
    PivotedOutputLinear,
    taken,
    unpack_bits,
)
from bs_exp.serving.parts import HeldFeatures, Part, Share, StoredGroup, held_features, stacks


class DenseMethod(Protocol):
    """How a server computes with a dense `weight [out, in]` of a module."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Brings the weight, now that it is there, into the form that its kernels want."""

    def apply(self, layer: Any, x: Any, bias: Any = None) -> Any:
        """`x @ weight^T + bias`."""


class Factor(nn.Module):
    """A map without bias by `weight [out, in]`, of `stored` numbers, which the server may pack once it is loaded."""

    def __init__(self, d_out: int, d_in: int, dtype: torch.dtype, method: DenseMethod):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in, dtype=dtype), requires_grad=False)
        self.method = method
        self.stored = self.weight.numel()

    def keep(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        """Drops all rows, or columns, but these."""
        weight = self.weight.data
        weight = weight if rows is None else weight[rows.to(weight.device)]
        weight = weight if columns is None else weight[:, columns.to(weight.device)]
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.stored = self.weight.numel()

    def finish(self) -> None:
        """Lets the server pack the weight."""
        if self.stored:
            self.method.process_weights_after_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.method.apply(self, x, None))


class Bases(nn.Module):
    """The bases of one or more groups as one map, rows stacked: one object in all layers that hold the groups."""

    def __init__(self, groups: Sequence[StoredGroup], share: Share, dtype: torch.dtype, method: DenseMethod):
        super().__init__()
        shapes = [group.kind.shapes(share.d_in, share.d_out, group.rank).basis for group in groups]
        self.share = share
        self.groups = tuple(groups)
        self.widths = [rows for rows, _ in shapes]
        self.reads_selected = issubclass(groups[0].kind, PivotedInputLinear)
        # Which columns a process keeps of a basis without those of its pivots is known once the pivots are.
        self.cut_later = self.reads_selected and not share.all_inputs
        columns = shapes[0][1] if self.reads_selected else share.inputs.stop - share.inputs.start
        self.map = Factor(sum(self.widths), columns, dtype, method)
        self.missing = set(groups)
        self.pivots: dict[StoredGroup, Tensor] = {}
        self.is_finished = False

    def load(self, group: StoredGroup, tensor: Tensor) -> None:
        index = self.groups.index(group)
        first = sum(self.widths[:index])
        taken = tensor if self.reads_selected else tensor[:, self.share.inputs]
        _copy(self.map.weight.data[first : first + self.widths[index]], taken, f"the basis of {group.members[0]}")
        self.missing.discard(group)

    def same_pivots(self, group: StoredGroup, pivots: Tensor) -> None:
        """ValueError if a peer has other pivots: they are those of the one basis."""
        if not torch.equal(self.pivots.setdefault(group, pivots), pivots):
            raise ValueError(f"{', '.join(group.members)} share a basis, but their pivots differ: the file is damaged.")

    def finish(self, columns: Tensor | None) -> None:
        """Cuts, once, what this process does not hold, and has the basis packed."""
        if self.is_finished:
            return
        if self.missing:
            owner = next(iter(self.missing)).members[0]
            raise ValueError(f"The files of the weights hold no basis of {owner}: they do not fit config.json.")
        if self.cut_later:
            self.map.keep(columns=columns)
        self.map.finish()
        self.is_finished = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        z = self.map(x)
        return z.split(self.widths, dim=-1) if len(self.widths) > 1 else (z,)


@dataclass
class Slot:
    """Where a tensor of the checkpoint goes: its shape there, and what takes it."""

    shape: tuple[int, ...]
    load: Callable[[Tensor], None]
    is_loaded: bool = False


class PartOfLayer(nn.Module):
    """A stored matrix of a layer, as much of it as this process holds: dense, or the coefficients of a basis.

    Its outputs begin at `offset` among those of the layer. A correction (`up(down(x))`) is a low-rank term of its own.
    """

    def __init__(self, part: Part, share: Share, offset: int, dtype: torch.dtype, method: DenseMethod):
        super().__init__()
        self.part, self.share, self.group, self.offset = part, share, part.group, offset
        self.rank = 0 if part.group is None else part.group.rank
        self.is_output_pivoted = part.group is not None and issubclass(part.group.kind, PivotedOutputLinear)
        self.d_out = sum(s.stop - s.start for s in share.outputs)
        self.slots: dict[str, Slot] = {}
        d_in = share.inputs.stop - share.inputs.start
        self.down: Factor | None = None
        if self.group is None:
            self.weight = Factor(self.d_out, d_in, dtype, method)
            self._slot("weight", (share.d_out, share.d_in), self.weight, rows=True, columns=True)
            return
        shapes = self.group.kind.shapes(share.d_in, share.d_out, self.group.rank)
        prefix = "shared." if self.group.correction else ""
        # Which rows a process keeps of coefficients without those of the pivots is known once the pivots are.
        rows = shapes.weight[0] if self.is_output_pivoted else self.d_out
        self.weight = Factor(rows, self.group.rank, dtype, method)
        self._slot(f"{prefix}weight", shapes.weight, self.weight, rows=not self.is_output_pivoted)
        if shapes.kept:
            ((name, (shape, kept_dtype)),) = shapes.kept.items()
            self.register_buffer(name, torch.empty(shape, dtype=kept_dtype), persistent=False)
            self.slots[f"{prefix}{name}"] = Slot(shape, self._keep_pivots)
        if self.group.correction:
            self.down = Factor(self.group.correction, d_in, dtype, method)
            self.up = Factor(self.d_out, self.group.correction, dtype, method)
            self._slot("down", (self.group.correction, share.d_in), self.down, columns=True)
            self._slot("weight", (share.d_out, self.group.correction), self.up, rows=True)

    def _slot(
        self, name: str, shape: tuple[int, ...], factor: Factor, *, rows: bool = False, columns: bool = False
    ) -> None:
        def load(tensor: Tensor) -> None:
            tensor = self.share.of_outputs(tensor) if rows else tensor
            tensor = tensor[:, self.share.inputs] if columns else tensor
            _copy(factor.weight.data, tensor, f"{self.part.name}.{name}")

        self.slots[name] = Slot(shape, load)

    def _keep_pivots(self, pivots: Tensor) -> None:
        cast("Tensor", self.pivots).copy_(pivots)

    def load(self, name: str, tensor: Tensor) -> None:
        slot = self.slots.get(name)
        if slot is None:
            raise ValueError(
                f"The files of the weights hold {self.part.name}.{name}, of which config.json says nothing: they do "
                "not belong together."
            )
        # vLLM transposes what is called `weight` in models whose dense layers are stored `[in, out]`; factors are not.
        is_transposed = tensor.dim() == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous()
        if self.group is not None and is_transposed and tensor.T.shape == slot.shape:
            tensor = tensor.T
        if tensor.shape != slot.shape:
            raise ValueError(
                f"{self.part.name}.{name} has the shape {list(tensor.shape)} in the files of the weights, but "
                f"{list(slot.shape)} by config.json: they do not belong together."
            )
        slot.load(tensor)
        slot.is_loaded = True

    def finish(self, bases: Bases | None) -> None:
        """After loading: reads the pivots, drops what other processes hold, has the factors packed."""
        if absent := [name for name, slot in self.slots.items() if not slot.is_loaded]:
            raise ValueError(
                f"The files of the weights hold no {self.part.name}.{absent[0]}: they do not fit config.json. (vLLM's "
                "load_format=dummy does not make factors.)"
            )
        columns = None
        if self.group is not None and issubclass(self.group.kind, PivotedLinear):
            assert bases is not None
            held = self._read_pivots(bases)
            columns = held.rows
            if self.is_output_pivoted and len(held.rows) < len(self.weight.weight):
                self.weight.keep(rows=held.rows)
        if bases is not None:
            bases.finish(columns)
        self.weight.finish()
        if self.down is not None:
            self.down.finish()
            self.up.finish()

    def _read_pivots(self, bases: Bases) -> HeldFeatures:
        assert self.group is not None
        pivots = cast("Tensor", self.pivots)
        cpu = pivots.cpu()
        found = f"{zlib.crc32(cpu.numpy().tobytes()):08x}"
        on_inputs = issubclass(self.group.kind, PivotedInputLinear)
        is_pivot = unpack_bits(cpu, self.share.d_in if on_inputs else self.share.d_out)
        if self.group.checksum not in (None, found) or int(is_pivot.sum()) != self.group.rank:
            raise ValueError(
                f"The pivots of {self.part.name} have the checksum {found} and {int(is_pivot.sum())} bits; config.json "
                f"says {self.group.checksum} and {self.group.rank}. The file is damaged, or of another config.json."
            )
        bases.same_pivots(self.group, cpu)
        if on_inputs:
            features = torch.arange(self.share.inputs.start, self.share.inputs.stop)
        else:
            features = self.share.output_features
        held = held_features(is_pivot, features)
        # Outputs are placed among those of the layer, inputs taken from those of the layer.
        offset = 0 if on_inputs else self.offset
        places = {"own": held.own + offset, "others": held.others + offset, "components": held.components}
        for name, places_of in places.items():
            self.register_buffer(name, places_of.to(pivots.device), persistent=False)
        self.all_components = len(held.components) == self.group.rank
        return held

    def components_of(self, x: Tensor, bases: Bases) -> Tensor:
        """`z` of a basis with pivots among its inputs: those inputs, and what the others are worth in them."""
        own = taken(x, cast("Tensor", self.own))
        if not bases.map.stored and self.all_components:
            return own
        if not bases.map.stored:
            z = x.new_zeros(*x.shape[:-1], self.rank)
        else:
            z = bases.map(taken(x, cast("Tensor", self.others)))
        return z + own if self.all_components else z.index_add(-1, cast("Tensor", self.components), own)

    def values(self, x: Tensor, z: Tensor | None) -> list[tuple[Tensor | slice, Tensor]]:
        """Its outputs, with their places among those of the layer, from the input and the components of its basis."""
        whole = slice(self.offset, self.offset + self.d_out)
        if z is None or not self.is_output_pivoted:
            return [(whole, self.weight(x if z is None else z))]
        own = z if self.all_components else taken(z, cast("Tensor", self.components))
        values: list[tuple[Tensor | slice, Tensor]] = [(cast("Tensor", self.own), own)]
        if self.weight.stored:
            values.append((cast("Tensor", self.others), self.weight(z)))
        return values


class FactorisedLayer(nn.Module):
    """All parts of a server's layer: `y = parts(x, bases(x)) + bias`."""

    def __init__(self, parts: Sequence[PartOfLayer], bases: Sequence[Bases]):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.bases = nn.ModuleList(bases)
        self.d_out = sum(part.d_out for part in parts)
        self.is_cut = any(part.is_output_pivoted for part in parts)
        # By number, so that the forward pass compares no groups: of every part, where its components are among those of
        # all bases; of every basis with pivots among its inputs, the first part that knows these.
        groups = [group for of in bases for group in of.groups]
        self.component = [None if part.group is None else groups.index(part.group) for part in parts]
        first = {part.group: i for i, part in reversed(list(enumerate(parts)))}
        self.reader = [first[of.groups[0]] if of.reads_selected else None for of in bases]

    def _parts(self) -> list[PartOfLayer]:
        return cast("list[PartOfLayer]", list(self.parts))

    def _bases(self) -> list[Bases]:
        return cast("list[Bases]", list(self.bases))

    def _bases_of(self, group: StoredGroup) -> Bases:
        return next(of for of in self._bases() if group in of.groups)

    def load(self, part: int, name: str, tensor: Tensor) -> None:
        """Takes a tensor that the checkpoint has by this name in the module of a part."""
        piece = self._parts()[part]
        if piece.group is not None and name == ("shared.basis" if piece.group.correction else "basis"):
            self._bases_of(piece.group).load(piece.group, tensor)
        else:
            piece.load(name, tensor)

    def finish(self) -> None:
        """Once all is loaded. ValueError for what is missing, or does not fit its peers."""
        for part in self._parts():
            part.finish(None if part.group is None else self._bases_of(part.group))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        parts = self._parts()
        components: list[Tensor] = []
        for of, reader in zip(self._bases(), self.reader, strict=True):
            components += of(x) if reader is None else (parts[reader].components_of(x, of),)
        values = []
        for part, i in zip(parts, self.component, strict=True):
            values += part.values(x, None if i is None else components[i])
        if not self.is_cut:
            y = values[0][1] if len(values) == 1 else torch.cat([value for _, value in values], dim=-1)
        else:
            y = x.new_empty(*x.shape[:-1], self.d_out)
            for place, value in values:
                if isinstance(place, slice):
                    y[..., place] = value
                else:
                    y.index_copy_(-1, place, value)
        for part in parts:
            if part.down is not None:
                y[..., part.offset : part.offset + part.d_out] += part.up(part.down(x))
        return y if bias is None else y + bias


def _copy(to: Tensor, tensor: Tensor, what: str) -> None:
    if to.shape != tensor.shape:
        raise ValueError(
            f"{what} has the shape {list(tensor.shape)} in the files of the weights; {list(to.shape)} follows from "
            "config.json: they do not belong together."
        )
    to.copy_(tensor)


def factorised_layer(
    parts: Sequence[Part],
    shares: Sequence[Share],
    bases_of: Callable[[tuple[StoredGroup, ...], Share], Bases],
    fused: Mapping[str, Sequence[str]],
    dtype: torch.dtype,
    method: DenseMethod,
) -> FactorisedLayer:
    """The layer of these parts, not yet filled; `bases_of` returns the one object for the bases of some groups."""
    pieces, offset = [], 0
    for part, held in zip(parts, shares, strict=True):
        pieces.append(PartOfLayer(part, held, offset, dtype, method))
        offset += pieces[-1].d_out
    share_of = {part.group: held for part, held in zip(parts, shares, strict=True)}
    groups = [part.group for part in parts if part.group is not None]
    return FactorisedLayer(pieces, [bases_of(stack, share_of[stack[0]]) for stack in stacks(groups, fused)])


class SharedBases:
    """The bases of one model: layers that hold the same groups get the same object, for as long as one holds it."""

    def __init__(self, dtype: torch.dtype, method: DenseMethod):
        self._dtype, self._method = dtype, method
        self._found: WeakValueDictionary[tuple[StoredGroup, ...], Bases] = WeakValueDictionary()

    def __call__(self, groups: tuple[StoredGroup, ...], share: Share) -> Bases:
        """ValueError if a layer holds other inputs of its matrices than its peers."""
        found = self._found.get(groups)
        if found is None:
            found = self._found[groups] = Bases(groups, share, self._dtype, self._method)
        if (found.share.inputs, found.share.d_in) != (share.inputs, share.d_in):
            raise ValueError(
                f"{', '.join(groups[0].members)} share a basis, but the server splits their inputs in different ways. "
                "Serve without tensor parallelism."
            )
        return found
