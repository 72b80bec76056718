"""Groups that the user lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from bs_exp.errors import ConfigError
from bs_exp.protocols import SharingProblem
from bs_exp.types import MATRIX_TYPES, Architecture, ExpertPlace, Statistic, WeightGroup
from bs_exp.validation import shown


@dataclass(frozen=True, kw_only=True)
class ExplicitSharing:
    """Lists of layers by matrix type, adjacent or not; every layer that is not listed stays alone.

    An expert's matrix is named by its layer and its number, `[layer, expert]`.
    Any grouping can be written down like this, also the one in another run's plan.
    """

    layers: Mapping[str, tuple[tuple[Any, ...], ...]] | None

    measured: ClassVar[bool] = False
    in_nats: ClassVar[bool] = False
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping | None):
            raise _malformed(self.layers)
        lists = {matrix: _lists(matrix, listed) for matrix, listed in (self.layers or {}).items()}
        object.__setattr__(self, "layers", lists)

    def check(self, architecture: Architecture) -> None:
        """ConfigError unless the model has all listed types and layers, and the layers of a group have one shape."""
        if not self.layers:
            raise ConfigError(
                "sharing.layers is empty: list layers by matrix type, such as {q: [[0, 1], [2, 5]]}, or use "
                "sharing=none."
            )
        for matrix, groups in self.layers.items():
            key = f"sharing.layers.{matrix}"
            if matrix not in architecture.matrix_types:
                what = "is not in this model" if matrix in MATRIX_TYPES else "is no matrix type"
                raise ConfigError(
                    f"{key}: {matrix} {what}. Matrix types of this model: {', '.join(architecture.matrix_types)}."
                )
            shapes = {m.place: (m.d_in, m.d_out) for m in architecture.of_type(matrix)}
            for group in groups:
                if outside := [layer for layer in group if layer not in shapes]:
                    raise ConfigError(f"{key} names layer {outside[0]}, but {_told(matrix, sorted(shapes))}.")
                if len({shapes[layer] for layer in group}) > 1:
                    found = ", ".join(f"{layer}: {shapes[layer]}" for layer in group)
                    raise ConfigError(
                        f"{key} puts layers {list(group)} together, whose shapes (d_in, d_out) differ: {found}. Only "
                        "matrices of one shape can share a basis."
                    )

    def groups(self, problem: SharingProblem) -> tuple[WeightGroup, ...]:
        """All groups, ordered by matrix type and first layer; raises what `check` raises."""
        architecture = problem.architecture
        self.check(architecture)
        found = []
        lists = self.layers or {}
        for matrix in architecture.matrix_types:
            listed = {group[0]: group for group in lists.get(matrix, ())}
            joined = {layer for group in listed.values() for layer in group[1:]}
            for m in architecture.of_type(matrix):
                if m.place not in joined:
                    found.append(WeightGroup(matrix, listed.get(m.place, (m.place,)), m.d_in, m.d_out))
        return tuple(found)


def _lists(matrix: str, listed: object) -> tuple[tuple[int, ...], ...]:
    """The lists of a matrix type, each sorted; ConfigError if they are no lists of layers, or name a layer twice."""
    if not isinstance(listed, list | tuple) or not all(isinstance(group, list | tuple) and group for group in listed):
        raise _malformed({matrix: listed})
    places = [[_place(matrix, named, listed) for named in group] for group in listed]
    layers = [layer for group in places for layer in group]
    if twice := [layer for layer, count in Counter(layers).items() if count > 1]:
        raise ConfigError(f"layers.{matrix} names layer {twice[0]} twice; a matrix belongs to one group.")
    return tuple(tuple(sorted(group)) for group in places)


def _place(matrix: str, named: object, listed: object) -> int:
    """A layer, or the place of an expert in one; ConfigError for anything else, with all that was listed."""
    pair = named if isinstance(named, list | tuple) and len(named) == 2 else None
    for number in pair or (named,):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ConfigError(
                f"layers.{matrix}: layers are whole numbers from 0, got {named!r}; an expert is named [layer, expert]. "
                f"Given was {listed!r}."
            )
    if pair is None:
        return cast("int", named)
    if pair[1] >= ExpertPlace.MOST_EXPERTS:
        raise ConfigError(f"layers.{matrix}: no layer has an expert of the number {pair[1]}.")
    return ExpertPlace(*pair)


def _malformed(value: object) -> ConfigError:
    return ConfigError(
        f"layers must give lists of layers by matrix type, such as {{q: [[0, 1], [2, 5]]}}, got {shown(value)}."
    )


def _told(matrix: str, places: list[int]) -> str:
    """Where a matrix type is, as text."""
    experts = [place for place in places if isinstance(place, ExpertPlace)]
    if not experts:
        return f"{matrix} is in layers {_ranges(places)}"
    return (
        f"{matrix} is in experts 0-{max(place.expert for place in experts)} of layers "
        f"{_ranges(sorted({place.layer for place in experts}))}, each named [layer, expert]"
    )


def _ranges(layers: list[int]) -> str:
    """Layers as text, with consecutive ones shortened: `0-3, 6`."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
