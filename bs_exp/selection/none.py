"""No selection: the recipe is used as it is composed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bs_exp.protocols import Contest
from bs_exp.types import TokenWindows


@dataclass(frozen=True, kw_only=True)
class NoSelection:
    """There are no candidates."""

    @property
    def candidates(self) -> Mapping[str, Mapping[str, Any]]:
        return {}

    def contest(self, windows: TokenWindows) -> Contest:
        raise ValueError("NoSelection has no candidates to compare.")
