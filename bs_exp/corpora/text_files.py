"""Text from local files."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bs_exp.corpora.provenance import describe
from bs_exp.errors import ConfigError, DataError

_DECOMPRESS = {".xz": lzma.decompress, ".gz": gzip.decompress, ".bz2": bz2.decompress}
_BROKEN_ARCHIVE = (lzma.LZMAError, zlib.error, EOFError, OSError, ValueError)


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Local UTF-8 text: a single plain file exactly as it is, several joined by `joiner`.

    `.jsonl` files hold one document per line, its text in `field`; documents are joined like files.
    `.xz`, `.gz` and `.bz2` files are unpacked. Relative paths start at the working directory.
    """

    files: Sequence[str]
    field: str = "text"
    joiner: str = "\n\n"

    def __post_init__(self) -> None:
        files = (self.files,) if isinstance(self.files, str) else tuple(self.files or ())
        if not files:
            raise ConfigError("files is empty; name at least one text file, for example files=[notes.txt].")
        object.__setattr__(self, "files", files)

    def read(self) -> tuple[str, Mapping[str, Any]]:
        """The text of all files in order; DataError if one is missing, empty or not text."""
        text = self.joiner.join(self._read_file(Path(name)) for name in self.files)
        return text, describe("text", text, files=list(self.files))

    def _read_file(self, path: Path) -> str:
        text = _decode(path, _read_bytes(path))
        if ".jsonl" in path.suffixes:
            text = self.joiner.join(self._documents(path, text))
        if not text.strip():
            raise DataError(f"{path} holds no text; remove it from files, or fill it.")
        return text

    def _documents(self, path: Path, text: str) -> list[str]:
        """The field of every line that is not blank."""
        # Not splitlines: a JSON string may hold U+2028, which is no end of line in JSON Lines.
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        return [self._document(path, number, line) for number, line in lines]

    def _document(self, path: Path, number: int, line: str) -> str:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object with the key {self.field!r}, got {line[:80]}.")
        document = row.get(self.field)
        if not isinstance(document, str):
            found = "nothing" if document is None else type(document).__name__
            raise DataError(
                f"{path}, line {number}: the key {self.field!r} must hold text, found {found}; "
                f"the line's keys are {', '.join(row) or 'none'}. Set `field` of the corpus to the one "
                "that holds the text (calibration.corpus.field=NAME)."
            )
        return document


def _read_bytes(path: Path) -> bytes:
    """The file's unpacked content."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist (looked in {Path.cwd()}); files must name text files.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); files must name text files.") from error
    decompress = _DECOMPRESS.get(path.suffix)
    if decompress is None:
        return content
    try:
        return decompress(content)
    except _BROKEN_ARCHIVE as error:
        raise DataError(f"{path} is no complete {path.suffix} file ({error}); make or copy it anew.") from error


def _decode(path: Path, content: bytes) -> str:
    """UTF-8 text, its line ends and any other character untouched."""
    zero = content.find(b"\0")
    if zero >= 0:
        raise DataError(f"{path} is a binary file (a zero byte at offset {zero:,}); text must be UTF-8.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte {content[error.start]:#04x} at offset {error.start:,}. "
            "Convert it to UTF-8, for example with iconv."
        ) from error
