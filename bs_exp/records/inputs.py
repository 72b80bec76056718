"""What a result came from, by content: texts, model folders and code of others under the names that settings give them.

Settings hold paths and class names, so a configuration's hash stays when what lies there changes. Stamps tell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bs_exp.errors import RecordError
from bs_exp.records.record import FILE_NAME, RunRecord, Status, read_record
from bs_exp.records.settings import result_settings

# Under these keys of a run's provenance.
CODE = "code"
FILES = "files"
# Settings that name files or folders which are read.
READ = frozenset({"file", "files", "path"})
_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.py")
_LARGE = 1 << 30
_FIRST = 1 << 20

_stamps: dict[Path, str] = {}


def file_stamps(settings: Any) -> dict[str, str]:
    """A hash of content by path as it is set, for every existing file or folder that settings (plain data) name.

    Looked at are the settings `files`, `file` and `path`, wherever they stand. A stamp is made once in a process: what
    changes later under the same name is not what the process has read. Files above 1 GiB are told by their size, the
    time of their last change and their first MiB; of a folder with a model those that make a checkpoint count.
    """
    return {name: _stamp(path) for name in sorted(set(_named(settings))) if (path := Path(name).expanduser()).exists()}


def changed_inputs(record: RunRecord, stamps: Mapping[str, str]) -> list[str]:
    """Paths whose content is no longer the one that the record was made from; unknown ones have not changed."""
    before = _noted(record, FILES)
    return [name for name, stamp in stamps.items() if before.get(name, stamp) != stamp]


def earlier_code(record: RunRecord, sweep: Path) -> tuple[str, list[str]] | None:
    """A completed point of the sweep with the same settings and other code: its folder, and the classes that differ.

    `record` is the point at hand. Records that cannot be read are left out. None if there is no such point, or no code
    of others.
    """
    code = _noted(record, CODE)
    settings = result_settings(record.config)
    if not code:
        return None
    for folder in sorted(path.parent for path in sweep.glob(f"*/{FILE_NAME}")):
        try:
            other = read_record(folder)
        except RecordError:
            continue
        known = _noted(other, CODE)
        theirs = result_settings(other.config)
        same = all(theirs.get(key) == value for key, value in settings.items())
        changed = [target for target in code if known.get(target, code[target]) != code[target]]
        if same and changed and other.status is Status.COMPLETED:
            return folder.name, changed
    return None


def _noted(record: RunRecord, key: str) -> Mapping[str, Any]:
    """A part of a record's provenance; empty if it is not there, or nothing that this program wrote."""
    found = record.provenance.get(key)
    return found if isinstance(found, Mapping) else {}


def _named(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key in READ:
                yield from (name for name in _listed(value) if isinstance(name, str))
            yield from _named(value)
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for value in node:
            yield from _named(value)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _stamp(path: Path) -> str:
    path = path.resolve()
    if path not in _stamps:
        digest = hashlib.sha256()
        for file in [path] if path.is_file() else _files_that_count(path):
            digest.update(f"{'' if file == path else file.relative_to(path)}\0{_content(file)}\0".encode())
        _stamps[path] = digest.hexdigest()
    return _stamps[path]


def _files_that_count(folder: Path) -> list[Path]:
    """Of a model those that make a checkpoint; of a folder of texts all."""
    if (folder / "config.json").is_file():
        return sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern) if file.is_file()})
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _content(file: Path) -> str:
    """A file's SHA-256, or the reason why it cannot be read; the run itself raises the error."""
    try:
        with file.open("rb") as opened:
            about = file.stat()
            if about.st_size > _LARGE:
                start = hashlib.sha256(opened.read(_FIRST)).hexdigest()
                return f"{about.st_size} {about.st_mtime_ns} {start}"
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        return str(error.errno)
