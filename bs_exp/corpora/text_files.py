"""Text from local files."""

from __future__ import annotations

import bz2
import gzip
import hashlib
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
_JSON_LINES = frozenset({".jsonl", ".ndjson"})
_JSON = ".json"
# Files without a suffix are text too.
_PROSE = frozenset({"", ".txt", ".text", ".md", ".rst", ".tex", ".raw", ".tokens", ".log"})
_CODE = frozenset({".c", ".cc", ".cpp", ".go", ".h", ".hpp", ".java", ".js", ".py", ".rs", ".sh", ".sql", ".ts"})
_READ = "text (.txt, .md, .rst, .tex, .raw, .tokens, .log, source code, no suffix), .jsonl, .ndjson and .json"


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Local UTF-8 text: plain files as `open()` reads them, several files joined by `joiner`.

    The suffix says what a file holds, in capitals too. `.jsonl` and `.ndjson` hold one document per line, its text in
    `field`; `.json` likewise, or one array of documents. Documents are joined like files. `.xz`, `.gz` and `.bz2` are
    unpacked. Relative paths start at the working directory, `~` is the home folder.
    """

    files: Sequence[str]
    field: str = "text"
    joiner: str = "\n\n"

    def __post_init__(self) -> None:
        files = (self.files,) if isinstance(self.files, str) else tuple(self.files or ())
        if not files:
            raise ConfigError("files is empty; name at least one text file, for example files=[notes.txt].")
        if wrong := [name for name in files if not isinstance(name, str)]:
            raise ConfigError(f"files must be names of text files, got {wrong[0]!r}.")
        object.__setattr__(self, "files", files)

    def read(self) -> tuple[str, Mapping[str, Any]]:
        """The text of all files in order, and its provenance; DataError if one is missing, empty or unreadable."""
        text = self.joiner.join(self.documents())
        return text, describe("text", text, files=list(self.files))

    def stamp(self) -> str:
        """SHA-256 of the names and the bytes of the files, in order; DataError if one cannot be read.

        Nothing is unpacked or parsed.
        """
        digest = hashlib.sha256()
        for path in (Path(name).expanduser() for name in self.files):
            # The suffix says how a file is read.
            digest.update(f"{path.name}\0".encode() + hashlib.sha256(_content(path)).digest())
        return digest.hexdigest()

    def documents(self) -> list[str]:
        """The text of each plain file and of each row of the others, in order; DataError as for `read`."""
        return [document for name in self.files for document in self._read_file(Path(name).expanduser())]

    def _read_file(self, path: Path) -> list[str]:
        kind = _kind(path)
        text = _decode(path, _read_bytes(path))
        rows = kind in _JSON_LINES or kind == _JSON
        documents = self._documents(path, text, one_value=kind == _JSON) if rows else [text]
        if not any(document.strip() for document in documents):
            raise DataError(f"{path} holds no text; remove it from files, or fill it.")
        return documents

    def _documents(self, path: Path, text: str, *, one_value: bool) -> list[str]:
        """The text in `field` of every row: of every line that is not blank, or of every element of one array."""
        # Not splitlines: a JSON string may hold U+2028, which is no end of line in JSON Lines.
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        # C4 calls its JSON Lines .json: an array begins with a bracket, and its first line alone is no object.
        if one_value and lines and lines[0][1].lstrip().startswith("["):
            rows = _parse(text, str(path))
            return [self._document(f"{path}, element {n}", row) for n, row in enumerate(rows, start=1)]
        places = ((f"{path}, line {number}", line) for number, line in lines)
        return [self._document(place, _parse(line, place)) for place, line in places]

    def _document(self, place: str, row: object) -> str:
        if not isinstance(row, dict):
            raise DataError(f"{place}: expected an object with the key {self.field!r}, got {json.dumps(row)[:80]}.")
        document = row.get(self.field)
        if not isinstance(document, str):
            found = "nothing" if document is None else type(document).__name__
            raise DataError(
                f"{place}: the key {self.field!r} must hold text, found {found}; "
                f"its keys are {', '.join(row) or 'none'}. Set `field` of the corpus to the one "
                "that holds the text (calibration.corpus.field=NAME)."
            )
        try:
            document.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: the key {self.field!r} holds half of a surrogate pair "
                f"({document[error.start]!a} at character {error.start}), which is no text. Write the whole character, "
                "or take the row out."
            ) from error
        return document


def is_readable(path: Path) -> bool:
    """Whether files of this name are read."""
    try:
        _kind(path)
    except DataError:
        return False
    return True


def _kind(path: Path) -> str:
    """The suffix that says what the file holds, in lower case, without the suffix of a compression.

    Raises DataError for formats that are not read: markup and tables would be calibrated on as if they were prose.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _DECOMPRESS:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind not in _PROSE | _CODE | _JSON_LINES | {_JSON}:
        raise DataError(
            f"{path}: files that end in {kind} are not read. Read are {_READ}, each also as "
            f"{', '.join(_DECOMPRESS)}. Convert it; if it is plain text, name it .txt; tables and data sets (.csv, "
            ".parquet) are read by a corpus of `datasets`, with path=csv or path=parquet and data_files=[FILE] "
            "(see conf/corpus/wikitext2.yaml)."
        )
    return kind


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error}).") from error
    except RecursionError as error:
        raise DataError(f"{place}: JSON nested too deeply to be a document.") from error


def _content(path: Path) -> bytes:
    """The file's bytes; DataError if it cannot be read."""
    try:
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "no regular file"
            raise DataError(f"{path} cannot be read ({what}); files must name text files.")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist (looked in {Path.cwd()}); files must name text files.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); files must name text files.") from error


def _read_bytes(path: Path) -> bytes:
    """The file's content, unpacked by its suffix; DataError if it cannot be read or unpacked."""
    content = _content(path)
    suffix = path.suffix.lower()
    decompress = _DECOMPRESS.get(suffix)
    if decompress is None:
        return content
    try:
        return decompress(content)
    except _BROKEN_ARCHIVE as error:
        raise DataError(f"{path} is no complete {suffix} file ({error}); make or copy it anew.") from error


def _decode(path: Path, content: bytes) -> str:
    """UTF-8 text without a byte-order mark, with line ends as `open()` gives them: CRLF and CR become LF.

    Raises DataError if the content is not UTF-8, or holds a zero byte.
    """
    zero = content.find(b"\0")
    if zero >= 0:
        raise DataError(f"{path} is a binary file (a zero byte at offset {zero:,}); text must be UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte {content[error.start]:#04x} at offset {error.start:,}. "
            "Convert it to UTF-8, for example with iconv."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
