"""The embedded corpus behind the common interface."""

from __future__ import annotations

import pytest

from bs_exp.corpora.python_docs import PythonDocs
from bs_exp.demo.python_docs import read_python_docs
from bs_exp.errors import ConfigError


def test_it_is_the_text_of_its_split() -> None:
    text, provenance = PythonDocs(split="heldout").read()
    docs = read_python_docs("heldout")
    assert text == docs.text
    assert provenance["fingerprint"] == docs.fingerprint
    assert provenance["sources"] == docs.sources


def test_an_unknown_split_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match="heldout, calibration, train, got 'test'"):
        PythonDocs(split="test")
