"""A shared basis, and a low-rank correction for each of its layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from bs_exp.errors import ConfigError
from bs_exp.protocols import SharingProblem
from bs_exp.rank_budget import parameter_budget
from bs_exp.sharing.layers import check_matrices, check_named, check_size, cut, runs
from bs_exp.types import Architecture, Statistic, WeightGroup
from bs_exp.validation import check_at_least, check_names


@dataclass(frozen=True, kw_only=True)
class ResidualSharing:
    """As AdjacentSharing, and every layer of a shared group has a low-rank term of its own: `W_i = B C_i + D_i E_i`.

    `D_i E_i` is the best approximation of rank r = `residual_rank`, in the metric, of what the shared factors leave of
    layer i. A group of n stores `k (d_in + n d_out) + n r (d_in + d_out)` parameters, all of it inside the same budget.
    Groups of one layer need no correction; rank 0 is AdjacentSharing. Own method.
    """

    matrices: tuple[str, ...]
    group_size: int
    residual_rank: int

    measured: ClassVar[bool] = False
    in_nats: ClassVar[bool] = False
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrices", check_names("matrices", self.matrices))
        check_named(self.matrices)
        check_at_least(1, group_size=self.group_size)
        check_at_least(0, residual_rank=self.residual_rank)

    def check(self, architecture: Architecture) -> None:
        """ConfigError if the group size exceeds the layers, or no listed type occurs in the model."""
        check_size("group_size", self.group_size, architecture)
        check_matrices(self.matrices, architecture)

    def groups(self, problem: SharingProblem) -> tuple[WeightGroup, ...]:
        """All groups, ordered by matrix type and layer; ConfigError if corrections leave no room for a component."""
        architecture = problem.architecture
        self.check(architecture)
        found = []
        for matrix in architecture.matrix_types:
            for run in runs(architecture, matrix):
                for group in cut(run, self.group_size if matrix in self.matrices else 1):
                    corrected = replace(group, correction=self.residual_rank if group.size > 1 else 0)
                    _check_room(corrected, problem)
                    found.append(corrected)
        return tuple(found)


def _check_room(group: WeightGroup, problem: SharingProblem) -> None:
    """ConfigError unless the corrections and one shared component fit into the group's share of the parameters."""
    budget = parameter_budget(group.parameters, problem.retain_ratio)
    bare = replace(group, correction=0)
    room = (budget - problem.layout.parameters(bare, 1)) // (group.size * (group.d_in + group.d_out))
    if group.correction > max(room, 0):
        raise ConfigError(
            f"sharing.residual_rank must be at most {max(room, 0)} for {group.name} ({group.d_in} x {group.columns}) "
            f"at retain_ratio {problem.retain_ratio}, got {group.correction}: beyond that, corrections and one shared "
            "component exceed the budget. Lower it, or raise retain_ratio."
        )
