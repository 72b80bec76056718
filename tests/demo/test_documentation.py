"""The corpus is real documentation, the same every time, and its splits do not leak into each other."""

from __future__ import annotations

import re
import sys
from collections import Counter

import pytest

from bs_exp.demo.documentation import SPLIT_SHARES, clean_paragraphs, read_python_docs, source_versions, split_of


def long_paragraphs(text: str) -> Counter[str]:
    """Independent of the code under test: letters and digits of every paragraph of more than 50 characters."""
    parts = (part for part in re.split(r"\n[ \t]*\n", text) if len(part) > 50)
    return Counter("".join(c for c in part.casefold() if c.isalnum()) for part in parts)


@pytest.mark.slow
def test_splits_share_no_long_paragraph_and_repeat_none() -> None:
    heldout, calibration = (long_paragraphs(read_python_docs(split).text) for split in ("heldout", "calibration"))
    assert not heldout.keys() & calibration.keys()
    assert max(heldout.values()) == max(calibration.values()) == 1
    assert sum(map(len, heldout)) > 200_000 and sum(map(len, calibration)) > 400_000


def test_it_reads_like_documentation() -> None:
    docs = read_python_docs("heldout")
    letters = sum(c.isalpha() or c.isspace() for c in docs.text) / len(docs.text)
    assert letters > 0.75 and ">>> " not in docs.text
    assert docs.sources["torch"] != "not installed" and docs.sources["python"].startswith("3.")
    read_python_docs.cache_clear()
    assert read_python_docs("heldout").fingerprint == docs.fingerprint


@pytest.mark.slow
def test_reading_imports_nothing() -> None:
    before = set(sys.modules)
    read_python_docs.cache_clear()
    read_python_docs("heldout")
    packages = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not packages & set(source_versions())


def test_modules_are_dealt_by_name_in_the_given_shares() -> None:
    dealt = Counter(split_of(f"package.module_{i}") for i in range(20_000))
    for split, share in SPLIT_SHARES.items():
        assert dealt[split] / 20_000 == pytest.approx(share, abs=0.01)
    assert split_of("collections.abc") == split_of("collections.abc")


def test_code_and_symbols_are_cleaned_away() -> None:
    docstring = "Return the sum of all the given values.\n\n>>> add(1, 2)\n3\n\n+---+---+\n| 1 | 2 |\n+---+---+"
    assert list(clean_paragraphs(docstring)) == ["Return the sum of all the given values."]


def test_an_unknown_split_says_which_exist() -> None:
    with pytest.raises(ValueError, match="heldout, calibration, train, got 'test'"):
        read_python_docs("test")  # type: ignore[arg-type]
