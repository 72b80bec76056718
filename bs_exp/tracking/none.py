"""No tracking: results stand in the record only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class NullTracker:
    """Logs nothing."""

    def start(self, record: Mapping[str, object], folder: Path) -> NullTrackedRun:
        return NullTrackedRun()


@dataclass(frozen=True)
class NullTrackedRun:
    """The open run of `NullTracker`, which logs nothing."""

    def log(self, metrics: Mapping[str, object]) -> None:
        """Does nothing."""

    def finish(self, record: Mapping[str, object]) -> None:
        """Does nothing."""
