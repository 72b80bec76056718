"""Opens the storage of a study: memory, a journal file, or a database; and the lock that its processes share."""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from bs_exp.errors import ConfigError, SearchError
from bs_exp.files import write_file

_JOURNAL = "journal:"
_LOCK = ".study.lock"
_ATTEMPTS = 5
# How every line of a journal begins. Inside of a string of JSON its quotes would be escaped.
_BEGIN = b'{"op_code":'
# How every line ends: with the CRC-32 of the same line without it. Optuna reads over it; lines of others have none.
_CHECKSUM = re.compile(rb',"crc32":"([0-9a-f]{8})"}')


def open_storage(place: str | None, *, setting: str) -> BaseStorage:
    """The storage at a place: null (memory), PATH or journal:PATH (a journal file), or a database's URL.

    `setting` is the dial that names the place, for messages. Raises ConfigError for a place that is none of these, and
    SearchError if it cannot be opened.
    """
    if place is None:
        return InMemoryStorage()
    if "://" in place:
        return _database(place, setting)
    path = Path(place.removeprefix(_JOURNAL))
    if path.name == "" or path.is_dir():
        raise ConfigError(f"{setting} must be a file, a database's URL, or null, got {place!r}.")
    _make_folder(path, setting)
    try:
        return JournalStorage(_Journal(path, setting))
    except OSError as error:
        raise SearchError(f"{setting}={path} cannot be opened: {error}. Give another place.") from error
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise SearchError(f"{setting}={path} is damaged ({error!r}). Move it away, or give another place.") from error


def shown(place: str | None) -> str:
    """A place as messages may show it: without a password."""
    if place is None:
        return "memory"
    return make_url(place).render_as_string(hide_password=True) if "://" in place else place.removeprefix(_JOURNAL)


def file_of(place: str | None) -> Path | None:
    """The file that holds a storage; None for memory and for the server of a database."""
    if place is None:
        return None
    if "://" not in place:
        return Path(place.removeprefix(_JOURNAL))
    url = make_url(place)
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


@contextmanager
def answering(place: str | None) -> Iterator[None]:
    """Turns what Optuna raises if a storage is lost on the way into a SearchError that says why."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        raise SearchError(
            f"The study in {shown(place)} does not answer any more: {_reason(error)}. Its trials are kept: the same "
            "command goes on."
        ) from error


def _reason(error: BaseException) -> str:
    """What a storage says is wrong, in one line; Optuna's own errors only say that something is."""
    if isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    said = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
    return said.splitlines()[0].rstrip(".")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which is made if it does not exist; a thread may enter it again while it holds it.

    The lock is one of the operating system: it ends with its process. Raises SearchError if there can be none.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.resolve() / _LOCK, is_singleton=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise SearchError(
            f"Cannot lock {folder / _LOCK}: {error}. Put the search on a file system with locks: "
            "hydra.sweep.dir=FOLDER."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def exclusive(storage: BaseStorage, place: str | None, folder: Path) -> Iterator[None]:
    """Holds the lock that all processes on a storage share: of its file's folder, of PostgreSQL, else of `folder`.

    It ends with its process. Workers on another database server exclude each other only if they share the folder.
    """
    if isinstance(storage, RDBStorage) and storage.engine.dialect.name == "postgresql":
        with storage.engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('bs_exp'))"))
            yield
    else:
        file = file_of(place)
        with locked(folder if file is None else file.parent):
            yield


class _Journal(JournalFileBackend):
    """A journal file that survives processes that were killed, or ran out of disk space, while they wrote a line.

    An unfinished last line was never confirmed to its writer: it is cut off before the next line is written. Every line
    has a checksum, which is compared when the file is opened. The lock ends with its process, whereas Optuna's own
    stays for half a minute.
    """

    def __init__(self, path: Path, setting: str) -> None:
        self._path = path.absolute()
        self._mutex = FileLock(self._path.with_name(f".{path.name}.append.lock"))
        with self._mutex:
            self._repair(f"{setting}={path}")
        super().__init__(str(self._path))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Writes the logs at the end of the file. Raises StorageInternalError if that fails."""
        lines = b"".join(_line(log) for log in logs)
        try:
            with self._mutex, self._path.open("rb+") as file:
                end = file.seek(0, os.SEEK_END)
                if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                    file.seek(0)
                    file.seek(file.truncate(file.read().rfind(b"\n") + 1))
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, NotImplementedError) as error:
            raise StorageInternalError(f"{self._path} cannot be written") from error

    def _repair(self, name: str) -> None:
        """Takes unfinished lines out of finished ones that another process wrote behind them, and checks the rest."""
        if not self._path.exists():
            return
        *lines, unfinished = self._path.read_bytes().split(b"\n")
        first = [*lines, unfinished][0]
        if not (first.startswith(_BEGIN) or _BEGIN.startswith(first)):
            raise SearchError(
                f"{name} is a file, but no journal of a study. Give a new file; an SQLite file is sqlite:///{self._path}."
            )
        whole = [part for line in lines for part in _whole_lines(line)]
        if (found := _CHECKSUM.search(unfinished)) and found.end() >= len(unfinished) - 1:
            # All of it is there but its end, which is not there or was changed.
            whole, unfinished = [*whole, unfinished[: found.end()]], b""
        for number, line in enumerate(whole, 1):
            json.loads(line)
            if (found := _CHECKSUM.search(line)) and _crc32(line[: found.start()] + b"}") != found[1]:
                raise ValueError(f"line {number} does not fit its checksum: the disk or a transfer changed it")
        if whole != lines:
            write_file(self._path, b"\n".join([*whole, unfinished]))


def _whole_lines(line: bytes) -> list[bytes]:
    """The lines that stand in one: the last, and earlier ones as far as they are there to their checksum."""
    *earlier, last = re.split(b"(?=" + re.escape(_BEGIN) + b")", line)
    return [*(part[: found.end()] for part in earlier if (found := _CHECKSUM.search(part))), last]


def _line(log: Mapping[str, Any]) -> bytes:
    """A line of a journal, with its checksum at the end."""
    line = json.dumps(log, separators=(",", ":")).encode()
    return line[:-1] + b',"crc32":"' + _crc32(line) + b'"}\n'


def _crc32(content: bytes) -> bytes:
    """CRC-32 in eight hexadecimal digits."""
    return f"{zlib.crc32(content):08x}".encode()


def _make_folder(path: Path, setting: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SearchError(f"{setting}: {path} cannot be made: {error}. Give another place.") from error


def _check_pages(storage: RDBStorage, place: str) -> None:
    """SearchError if SQLite finds that pages or indexes of its file do not fit together."""
    with storage.engine.connect() as connection:
        found = str(connection.execute(text("PRAGMA integrity_check(1)")).scalar())
    if found != "ok":
        raise SearchError(f"{place} is damaged ({found}). Move it away, or give another place.")


def _database(url: str, setting: str) -> BaseStorage:
    try:
        parsed = make_url(url)
        sqlite = parsed.get_dialect().name == "sqlite"
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(
            f"{setting} is no URL of a database ({error}). Known: postgresql://USER:PASSWORD@HOST/NAME, "
            "mysql://..., sqlite:///FILE; a journal file is given by its path."
        ) from error
    if sqlite and parsed.database and parsed.database != ":memory:":
        _make_folder(Path(parsed.database), setting)
    # Writers of one SQLite file wait for each other; a server may have closed a connection during a long trial.
    engine = {"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True}
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            storage = RDBStorage(url, engine_kwargs=engine)
            if sqlite:
                _check_pages(storage, f"{setting}={shown(url)}")
            return storage
        except ImportError as error:
            missing = getattr(error.__cause__, "name", None) or "its module"
            raise SearchError(
                f"{setting}={shown(url)} needs a driver that is not installed: {missing}. For PostgreSQL: "
                "pip install '.[postgresql]' in a checkout."
            ) from error
        except (SQLAlchemyError, RuntimeError) as error:
            # Processes that start together make the tables together, and all but one of them fail.
            if attempt == _ATTEMPTS:
                raise SearchError(f"{setting}={shown(url)} cannot be opened: {_reason(error)}.") from error
            time.sleep(0.2 * attempt)
        except (ValueError, LookupError, TypeError) as error:  # what the tables hold is no version of theirs
            raise SearchError(
                f"{setting}={shown(url)} is damaged ({error!r}). Move it away, or give another place."
            ) from error
    raise AssertionError("unreachable")
