"""Every matrix by itself."""

from __future__ import annotations

from dataclasses import dataclass

from bs_exp.types import Architecture, WeightGroup


@dataclass(frozen=True, kw_only=True)
class NoSharing:
    """One group per matrix, as in SVD-LLM (2403.07378)."""

    def groups(self, architecture: Architecture) -> tuple[WeightGroup, ...]:
        return tuple(
            WeightGroup(m.matrix, (m.layer,), m.d_in, m.d_out)
            for matrix in architecture.matrix_types
            for m in architecture.of_type(matrix)
        )
