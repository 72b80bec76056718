"""Groups of adjacent layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from bs_exp.errors import ConfigError
from bs_exp.protocols import SharingProblem
from bs_exp.sharing.layers import check_matrices, check_named, check_size, cut, runs
from bs_exp.types import Architecture, Statistic, WeightGroup
from bs_exp.validation import check_at_least, check_names


@dataclass(frozen=True, kw_only=True)
class AdjacentSharing:
    """Groups of `group_size` consecutive layers from layer 0, for the types in `matrices`; the others stay alone.

    `group_size` is one number, or one for each matrix type (types that it leaves out stay alone). A remainder makes a
    smaller group. Layers whose matrices differ in shape are not put together.
    Basis Sharing (2410.03765), sections 3.2 and 4.
    """

    matrices: tuple[str, ...]
    group_size: int | Mapping[str, int]

    measured: ClassVar[bool] = False
    in_nats: ClassVar[bool] = False
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrices", check_names("matrices", self.matrices))
        check_named(self.matrices)
        if not isinstance(self.group_size, Mapping):
            check_at_least(1, group_size=self.group_size)
            return
        for matrix, size in self.group_size.items():
            check_at_least(1, **{f"group_size.{matrix}": size})
        if unlisted := sorted(set(self.group_size) - set(self.matrices)):
            raise ConfigError(
                f"group_size has a size for {', '.join(unlisted)}, but matrices is {list(self.matrices)}: "
                "list the type there too."
            )

    def size_of(self, matrix: str) -> int:
        """Layers per group of a matrix type; 1 for a type that is not in `matrices`."""
        if matrix not in self.matrices:
            return 1
        return self.group_size.get(matrix, 1) if isinstance(self.group_size, Mapping) else self.group_size

    def check(self, architecture: Architecture) -> None:
        """ConfigError if a group size exceeds the layers, or no listed type occurs in the model."""
        if isinstance(self.group_size, Mapping):
            for matrix, size in self.group_size.items():
                check_size(f"group_size.{matrix}", size, architecture)
        else:
            check_size("group_size", self.group_size, architecture)
        check_matrices(self.matrices, architecture)

    def groups(self, problem: SharingProblem) -> tuple[WeightGroup, ...]:
        """All groups, ordered by matrix type and layer; raises what `check` raises."""
        architecture = problem.architecture
        self.check(architecture)
        return tuple(
            group
            for matrix in architecture.matrix_types
            for run in runs(architecture, matrix)
            for group in cut(run, self.size_of(matrix))
        )
