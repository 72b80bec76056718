"""Groups of adjacent layers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from bs_exp.checks import check_at_least
from bs_exp.errors import ConfigError
from bs_exp.protocols import SharingProblem
from bs_exp.types import MATRIX_TYPES, Architecture, Statistic, WeightGroup


@dataclass(frozen=True, kw_only=True)
class AdjacentSharing:
    """Groups of `group_size` consecutive layers from layer 0, for the types in `matrices`; the others stay alone.

    A remainder makes a smaller group. Layers whose matrices differ in shape are not put together.
    Basis Sharing (2410.03765), sections 3.2 and 4.
    """

    matrices: tuple[str, ...]
    group_size: int

    measured: ClassVar[bool] = False
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrices", tuple(self.matrices))
        check_at_least(1, group_size=self.group_size)
        if not self.matrices:
            raise ConfigError("sharing.matrices is empty: name matrix types such as [q, k, v], or use sharing=none.")

    def check(self, architecture: Architecture) -> None:
        """ConfigError if the group size exceeds the layers, or no listed type occurs in the model."""
        if self.group_size > architecture.num_layers:
            raise ConfigError(
                f"sharing.group_size must be between 1 and {architecture.num_layers} (layers of this "
                f"{architecture.family} model), got {self.group_size}; 1 turns sharing off."
            )
        if unknown := sorted(set(self.matrices) - set(MATRIX_TYPES)):
            raise ConfigError(
                f"sharing.matrices: {', '.join(unknown)} is no matrix type. Matrix types: {', '.join(MATRIX_TYPES)}; "
                f"this model has {', '.join(architecture.matrix_types)}."
            )
        if not set(self.matrices) & set(architecture.matrix_types):
            raise ConfigError(
                f"sharing.matrices {list(self.matrices)} names no matrix type of this model, "
                f"which has {list(architecture.matrix_types)}."
            )

    def groups(self, problem: SharingProblem) -> tuple[WeightGroup, ...]:
        """All groups, by matrix type and layer."""
        architecture = problem.architecture
        self.check(architecture)
        groups = []
        for matrix in architecture.matrix_types:
            size = self.group_size if matrix in self.matrices else 1
            for (d_in, d_out), run in groupby(architecture.of_type(matrix), key=lambda m: (m.d_in, m.d_out)):
                layers = tuple(m.layer for m in run)
                groups += [
                    WeightGroup(matrix, layers[start : start + size], d_in, d_out)
                    for start in range(0, len(layers), size)
                ]
        return tuple(groups)
