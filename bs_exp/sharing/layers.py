"""Which layers may form a group: those of one stack (encoder or decoder), one matrix type and one shape.

Of experts it is those of one layer that may: their numbers mean nothing in another one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TypeAlias

from bs_exp.errors import ConfigError
from bs_exp.types import MATRIX_TYPES, Architecture, WeightGroup, WeightMatrix


def check_matrices(matrices: Sequence[str], architecture: Architecture) -> None:
    """ConfigError unless all are matrix types, and the model has at least one of them."""
    if unknown := sorted(set(matrices) - set(MATRIX_TYPES)):
        raise ConfigError(
            f"sharing.matrices: {', '.join(unknown)} is no matrix type. Matrix types: {', '.join(MATRIX_TYPES)}; "
            f"this model has {', '.join(architecture.matrix_types)}."
        )
    if not set(matrices) & set(architecture.matrix_types):
        raise ConfigError(
            f"sharing.matrices {list(matrices)} names no matrix type of this model, "
            f"which has {list(architecture.matrix_types)}."
        )


def check_named(matrices: Sequence[str]) -> None:
    """ConfigError if the list of matrix types is empty."""
    if not matrices:
        raise ConfigError("matrices is empty: name matrix types such as [q, k, v], or use sharing=none.")


def check_size(setting: str, size: int, architecture: Architecture) -> None:
    """ConfigError if a group would have more layers than the model, and more experts than one of its layers."""
    experts = 1 + max((m.expert for m in architecture.matrices if m.expert is not None), default=0)
    most, what = max((architecture.num_layers, "layers"), (experts, "experts in a layer"))
    if size > most:
        raise ConfigError(
            f"sharing.{setting} must be between 1 and {most} ({what} of this {architecture.family} model), got {size}; "
            "1 turns sharing off."
        )


def runs(architecture: Architecture, matrix: str) -> list[WeightGroup]:
    """The layers of a matrix type as runs of neighbours with one shape; a run never joins an encoder and its decoder.

    The experts of a layer, in the order of their numbers, are a run. Layers of different runs cannot be adjacent in a
    group.
    """
    return [
        WeightGroup(matrix, tuple(m.place for m in members), d_in, d_out)
        for (*_, d_in, d_out), members in groupby(architecture.of_type(matrix), key=_kind)
    ]


def by_shape(architecture: Architecture, matrix: str) -> list[WeightGroup]:
    """One group per shape of a matrix type, with all its layers, neighbours or not; encoder and decoder are apart, and
    so are the experts of every layer."""
    found: Mapping[_Kind, list[int]] = defaultdict(list)
    for m in architecture.of_type(matrix):
        found[_kind(m)].append(m.place)
    return [WeightGroup(matrix, tuple(layers), d_in, d_out) for (*_, d_in, d_out), layers in found.items()]


def part(whole: WeightGroup, layers: Iterable[int]) -> WeightGroup:
    """The group of some of the layers of `whole`."""
    return WeightGroup(whole.matrix, tuple(layers), whole.d_in, whole.d_out)


def cut(whole: WeightGroup, size: int) -> list[WeightGroup]:
    """The layers of `whole` in groups of `size`, in order; a remainder makes a smaller last group."""
    return [part(whole, whole.layers[start : start + size]) for start in range(0, whole.size, size)]


_Kind: TypeAlias = tuple[int, int | None, int, int]


def _kind(matrix: WeightMatrix) -> _Kind:
    # An encoder and its decoder read different tokens: their layers are never put together.
    return matrix.stack, None if matrix.expert is None else matrix.layer, matrix.d_in, matrix.d_out
