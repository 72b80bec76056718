"""Blocks of attention heads share a basis, instead of whole attention matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bs_exp.errors import ConfigError
from bs_exp.models.head_blocks import ALL, KV, check_separate, cut_heads
from bs_exp.protocols import SharingProblem
from bs_exp.sharing.layers import check_matrices, check_named, check_size, cut, runs
from bs_exp.types import Architecture, LoadedModel, Statistic, WeightGroup
from bs_exp.validation import check_at_least, check_names, shown


@dataclass(frozen=True, kw_only=True)
class HeadSharing:
    """As AdjacentSharing, with q, k, v and o split by head: blocks of the same heads share over consecutive layers.

    `heads_per_block` counts query heads: a number, `kv` (all that read the same head of keys and values), or `all`
    (whole matrices, so plain AdjacentSharing). Blocks of k and v hold the heads that a block of q reads, at least one;
    o is split along its inputs, q, k and v along their outputs. Other types in `matrices` share as whole matrices.
    Own method.
    """

    matrices: tuple[str, ...]
    group_size: int
    heads_per_block: int | str

    measured: ClassVar[bool] = False
    in_nats: ClassVar[bool] = False
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrices", check_names("matrices", self.matrices))
        check_named(self.matrices)
        check_at_least(1, group_size=self.group_size)
        if self.heads_per_block not in (KV, ALL):
            if isinstance(self.heads_per_block, str):
                raise ConfigError(
                    f"heads_per_block must be a number, {KV} or {ALL}, got {shown(self.heads_per_block)}."
                )
            check_at_least(1, heads_per_block=self.heads_per_block)

    def view(self, dense: LoadedModel) -> LoadedModel:
        """A twin whose attention matrices are split into blocks of heads; ConfigError if they cannot be split."""
        check_matrices(self.matrices, dense.architecture)
        if self.heads_per_block == ALL:
            return dense
        check_separate(dense)
        return cut_heads(dense, set(self.matrices), self.heads_per_block)

    def check(self, architecture: Architecture) -> None:
        """ConfigError if the group size exceeds the layers."""
        check_size("group_size", self.group_size, architecture)

    def groups(self, problem: SharingProblem) -> tuple[WeightGroup, ...]:
        """All groups, ordered by matrix type, block and layer; raises what `check` raises."""
        architecture = problem.architecture
        self.check(architecture)
        return tuple(
            group
            for matrix in architecture.matrix_types
            for run in runs(architecture, matrix)
            for group in cut(run, self.group_size if matrix.partition(".")[0] in self.matrices else 1)
        )
