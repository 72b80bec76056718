"""What identifies the text of a corpus in a key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from bs_exp.protocols import Corpus


@runtime_checkable
class Stamped(Protocol):
    """A corpus whose text is made from files, and is the same as long as these are."""

    def stamp(self) -> str:
        """A hash of the content of all that the text is made from, quicker to find than the text."""


def content_of(corpora: Mapping[str, Corpus]) -> dict[str, str]:
    """By name a hash of each text, or of what it is made from; DataError if a text cannot be read."""
    return {name: _of(corpus) for name, corpus in corpora.items()}


def _of(corpus: Corpus) -> str:
    return f"made from {corpus.stamp()}" if isinstance(corpus, Stamped) else f"text {corpus.read()[1]['fingerprint']}"
