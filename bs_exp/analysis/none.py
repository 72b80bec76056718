"""No analysis."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bs_exp.protocols import SharingProblem
from bs_exp.types import Architecture


@dataclass(frozen=True, kw_only=True)
class NoAnalysis:
    """Writes nothing."""

    def check(self, architecture: Architecture) -> None:
        """Raises nothing: every model fits."""

    def save(self, problem: SharingProblem, folder: Path) -> tuple[Path, ...]:
        return ()
