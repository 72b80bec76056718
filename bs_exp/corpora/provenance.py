"""What is recorded of a text, so that two runs on the same text can be told from two runs on different ones."""

from __future__ import annotations

import hashlib
from typing import Any


def describe(corpus: str, text: str, **origin: object) -> dict[str, Any]:
    """Plain data: the corpus' name, where its text came from, its length in characters and its SHA-256."""
    return {
        "corpus": corpus,
        **origin,
        "characters": len(text),
        "fingerprint": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
    }
