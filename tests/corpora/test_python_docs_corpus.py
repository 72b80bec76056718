"""The embedded corpus behind the common interface."""

from __future__ import annotations

from typing import Any

import pytest

from bs_exp.corpora import python_docs
from bs_exp.corpora.python_docs import PythonDocs
from bs_exp.demo.documentation import PythonDocs as Docs
from bs_exp.demo.documentation import read_python_docs
from bs_exp.errors import ConfigError, DataError


def test_it_is_the_text_of_its_split() -> None:
    text, provenance = PythonDocs(split="heldout").read()
    docs = read_python_docs("heldout")
    assert text == docs.text
    assert provenance["fingerprint"] == docs.fingerprint
    assert provenance["sources"] == docs.sources


def test_packages_are_parts_of_it_that_have_nothing_in_common() -> None:
    text, provenance = PythonDocs(split="heldout").read()
    names = ("python", "torch", "transformers", "numpy", "scipy", "sklearn", "pandas", "sympy")
    parts = {name: PythonDocs(split="heldout", packages=(name,)).read()[0] for name in names}
    paragraphs = {name: {p for p in part.split("\n\n") if len(p) > 50} for name, part in parts.items()}
    assert sum(map(len, paragraphs.values())) == len(set().union(*paragraphs.values()))
    assert sorted("\n\n".join(parts.values()).split("\n\n")) == sorted(text.split("\n\n"))
    both, of_both = PythonDocs(split="heldout", packages=["torch", "numpy"]).read()  # type: ignore[arg-type]
    assert sorted(both.split("\n\n")) == sorted([*parts["torch"].split("\n\n"), *parts["numpy"].split("\n\n")])
    assert of_both["packages"] == ["torch", "numpy"] and of_both["sources"].keys() == {"python", "torch", "numpy"}
    assert "packages" not in provenance and of_both["fingerprint"] != provenance["fingerprint"]


@pytest.mark.parametrize("packages", [("jax",), ("torch", "Numpy"), (), "torch", 3, [["torch"]]])
def test_unknown_packages_list_those_there_are(packages: Any) -> None:
    with pytest.raises(ConfigError, match=r"packages must be a list of some of python, torch, .*, or null, got"):
        PythonDocs(packages=packages)


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    docs = Docs(
        "heldout", ("torch.nn",), ("About torch.",), {"python": "3", "torch": "2", "sympy": "not installed"}, ()
    )
    monkeypatch.setattr(python_docs, "read_python_docs", lambda split: docs)
    assert PythonDocs(packages=("torch",)).read()[0] == "About torch."
    with pytest.raises(DataError, match=r"nothing of sympy in its heldout split \(sympy: not installed\)\. Install it"):
        PythonDocs(packages=("torch", "sympy")).read()


def test_an_unknown_split_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match="heldout, calibration, train, got 'test'"):
        PythonDocs(split="test")
