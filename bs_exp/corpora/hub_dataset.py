"""Text from a data set, of the Hugging Face hub or of a local folder, read through `datasets`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from bs_exp.corpora.provenance import describe
from bs_exp.errors import DataError
from bs_exp.validation import check_at_least

OFFLINE_ALTERNATIVES = (
    "Without network: python_docs (embedded), text with files=[FILE.txt], or a data set that is already in the "
    "Hugging Face cache (HF_HOME; HF_HUB_OFFLINE=1 makes it answer at once)."
)


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """The rows of one split, their `field` joined by `joiner`.

    `path`, `name`, `revision` and `data_files` are those of `datasets.load_dataset`, so `path` may be a hub id, a local
    folder, or a format (`parquet`, `json`) with `data_files`. `max_documents` takes the first rows only, None all;
    `streaming` reads the rows that are needed instead of downloading the whole split.
    """

    path: str
    split: str
    name: str | None = None
    field: str = "text"
    revision: str | None = None
    data_files: str | list[str] | Mapping[str, str] | None = None
    joiner: str = "\n\n"
    max_documents: int | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        check_at_least(1, max_documents=self.max_documents)

    def read(self) -> tuple[str, Mapping[str, Any]]:
        """The joined text, and its provenance; DataError if the data set, its split or its field cannot be read."""
        with _quiet_off_terminal():
            documents = self._documents()
        text = self.joiner.join(documents)
        if not text.strip():
            raise DataError(f"{self._label}: split {self.split!r} holds no text in the column {self.field!r}.")
        return text, describe(
            "hub",
            text,
            path=self.path,
            name=self.name,
            split=self.split,
            revision=self.revision,
            documents=len(documents),
        )

    @property
    def _label(self) -> str:
        return f"data set {self.path}" + (f" ({self.name})" if self.name else "")

    def _documents(self) -> list[str]:
        try:
            rows = datasets.load_dataset(
                self.path,
                self.name,
                split=self.split,
                revision=self.revision,
                data_files=self.data_files,
                streaming=self.streaming,
            )
            return list(self._texts(islice(rows, self.max_documents)))
        except ConnectionError as error:
            raise DataError(f"{self._label} cannot be reached: {error}. {OFFLINE_ALTERNATIVES}") from error
        # What `datasets` raises for a wrong path, configuration or split, a broken file, or a missing log-in.
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise DataError(
                f"{self._label} cannot be read: {error} Check path, name, split, revision and data_files. "
                f"{OFFLINE_ALTERNATIVES}"
            ) from error

    def _texts(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
        for number, row in enumerate(rows):
            text = row.get(self.field)
            if not isinstance(text, str):
                found = "no such column" if self.field not in row else type(text).__name__
                raise DataError(
                    f"{self._label}: row {number} must hold text in the column {self.field!r}, found {found}; "
                    f"the columns are {', '.join(row)}. Set `field` of the corpus to the one that holds the "
                    "text (calibration.corpus.field=NAME)."
                )
            yield text


@contextmanager
def _quiet_off_terminal() -> Iterator[None]:
    """Shows download bars on terminals only, so that log files stay readable."""
    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
