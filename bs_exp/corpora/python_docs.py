"""The embedded corpus: documentation of the running interpreter and of the installed packages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from bs_exp.checks import check_choice
from bs_exp.corpora.provenance import describe
from bs_exp.demo.python_docs import Split, read_python_docs
from bs_exp.errors import DataError


@dataclass(frozen=True, kw_only=True)
class PythonDocs:
    """One split of *python_docs*; no network, and no paragraph of one split in another.

    The text follows the installed versions, so its perplexities compare only where the fingerprints agree.
    """

    split: str = "heldout"

    def __post_init__(self) -> None:
        check_choice("split", self.split, get_args(Split))

    def read(self) -> tuple[str, Mapping[str, Any]]:
        """The split's text, and the versions of the packages that it was read from."""
        docs = read_python_docs(self.split)
        if not docs.text:
            raise DataError(
                "python_docs found no documentation beside this interpreter (an installation without sources?). "
                "Use text files instead: calibration=text, evaluation=text."
            )
        return docs.text, describe(
            "python_docs", docs.text, split=self.split, sources=dict(docs.sources), unparsed=list(docs.unparsed)
        )
