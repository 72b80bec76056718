"""The recorded identity of a text, by which runs on the same text are told from runs on different texts."""

from __future__ import annotations

import hashlib
from typing import Any


def describe(corpus: str, text: str, **origin: object) -> dict[str, Any]:
    """Plain data: the corpus' name, its origin, and the text's length in characters and SHA-256 (`fingerprint`)."""
    return {
        "corpus": corpus,
        **origin,
        "characters": len(text),
        "fingerprint": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
    }
