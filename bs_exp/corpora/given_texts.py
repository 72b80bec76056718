"""Text that is in memory already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bs_exp.corpora.provenance import describe
from bs_exp.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class GivenTexts:
    """Documents as they are, joined by `joiner`."""

    texts: Sequence[str]
    joiner: str = "\n\n"

    def __post_init__(self) -> None:
        if isinstance(self.texts, str) or not all(isinstance(text, str) for text in self.texts):
            raise ConfigError("texts must be a list of texts, one for each document.")
        object.__setattr__(self, "texts", tuple(self.texts))

    def read(self) -> tuple[str, Mapping[str, Any]]:
        """The joined documents; DataError if they are all empty."""
        text = self.joiner.join(self.texts)
        if not text.strip():
            raise DataError(f"texts holds {len(self.texts)} documents, and no text in them.")
        return text, describe("given", text, documents=len(self.texts))
