"""Text that is in memory already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from bs_exp.corpora.provenance import describe
from bs_exp.errors import ConfigError, DataError
from bs_exp.validation import shown


@dataclass(frozen=True, kw_only=True)
class GivenTexts:
    """Documents as they are, joined by `joiner`."""

    texts: Sequence[str]
    joiner: str = "\n\n"

    def __post_init__(self) -> None:
        given: object = self.texts
        # Of a mapping Python would take the keys, and of a set any order.
        if isinstance(given, str | bytes | Mapping | Set) or not isinstance(given, Iterable):
            raise ConfigError(f"texts must be a list of texts, one for each document, got {shown(given)}.")
        texts = tuple(given)  # once: it may be a generator
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise ConfigError(f"texts must be a list of texts, but element {place} is {shown(text)}.")
        object.__setattr__(self, "texts", texts)

    def read(self) -> tuple[str, Mapping[str, Any]]:
        """The joined documents; DataError if they are all empty."""
        text = self.joiner.join(self.texts)
        if not text.strip():
            raise DataError(f"texts holds {len(self.texts)} documents, and no text in them.")
        return text, describe("given", text, documents=len(self.texts))
