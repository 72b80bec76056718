"""No sharing: every matrix has a basis of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bs_exp.protocols import SharingProblem
from bs_exp.types import Architecture, Statistic, WeightGroup


@dataclass(frozen=True, kw_only=True)
class NoSharing:
    """One group per matrix, as in SVD-LLM (2403.07378)."""

    measured: ClassVar[bool] = False
    in_nats: ClassVar[bool] = False
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def check(self, architecture: Architecture) -> None:
        """Raises nothing: every model fits."""

    def groups(self, problem: SharingProblem) -> tuple[WeightGroup, ...]:
        return singles(problem.architecture)


def singles(architecture: Architecture) -> tuple[WeightGroup, ...]:
    """Every matrix in a group of its own, ordered by matrix type and layer."""
    return tuple(
        WeightGroup(m.matrix, (m.place,), m.d_in, m.d_out)
        for matrix in architecture.matrix_types
        for m in architecture.of_type(matrix)
    )
