"""The embedded corpus: documentation of the running interpreter and of the installed packages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from bs_exp.corpora.provenance import describe
from bs_exp.demo.documentation import PACKAGES, PYTHON, Split, read_python_docs, sources_hash
from bs_exp.errors import ConfigError, DataError
from bs_exp.validation import check_choice, shown


@dataclass(frozen=True, kw_only=True)
class PythonDocs:
    """One split of *python_docs*, of some `packages` or of all; no network.

    `packages` name installed packages, and `python` for the standard library with the language reference. No paragraph
    of a split or a package is in another one, so packages can serve as different texts. The text depends on the
    installed versions, so perplexities can be compared only where the fingerprints agree.
    """

    split: str = "heldout"
    packages: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_choice("split", self.split, get_args(Split))
        if self.packages is None:
            return
        known = (PYTHON, *PACKAGES)
        listed = isinstance(self.packages, list | tuple) and self.packages
        if not listed or any(package not in known for package in self.packages):
            raise ConfigError(
                f"packages must be a list of some of {', '.join(known)}, or null, got {shown(self.packages)}."
            )
        object.__setattr__(self, "packages", tuple(self.packages))

    def stamp(self) -> str:
        return sources_hash(self.split)

    def read(self) -> tuple[str, Mapping[str, Any]]:
        """The text, and its provenance with the packages' versions; DataError if a listed package has no text."""
        docs = read_python_docs(self.split)
        part: dict[str, Any] = {}
        if self.packages is not None:
            if empty := [package for package in self.packages if not docs.of([package]).text]:
                raise DataError(
                    f"python_docs found nothing of {', '.join(empty)} in its {self.split} split "
                    f"({', '.join(f'{package}: {docs.sources[package]}' for package in empty)}). Install it, or leave "
                    "it out of packages."
                )
            docs, part = docs.of(self.packages), {"packages": list(self.packages)}
        if not docs.text:
            raise DataError(
                "python_docs found no documentation beside this interpreter (an installation without sources?). "
                "Use text files instead: calibration=text, evaluation=text."
            )
        return docs.text, describe(
            "python_docs",
            docs.text,
            split=self.split,
            **part,
            sources=dict(docs.sources),
            unparsed=list(docs.unparsed),
        )
