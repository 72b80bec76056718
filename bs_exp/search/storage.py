"""Where a study is kept: in memory, in a journal file, or in a database."""

from __future__ import annotations

import json
import time
from pathlib import Path

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from bs_exp.errors import ConfigError, SearchError

_JOURNAL = "journal:"
_ATTEMPTS = 5


def open_storage(place: str | None, *, setting: str) -> BaseStorage:
    """The storage at a place: null (memory), PATH or journal:PATH (a journal file), or a database's URL.

    `setting` is the dial that names the place, for messages.
    ConfigError for a place that is none of these, SearchError if it cannot be opened.
    """
    if place is None:
        return InMemoryStorage()
    if "://" in place:
        return _database(place, setting)
    path = Path(place.removeprefix(_JOURNAL))
    if path.name == "" or path.is_dir():
        raise ConfigError(f"{setting} must be a file, a database's URL, or null, got {place!r}.")
    return _journal(path, setting)


def shown(place: str | None) -> str:
    """A place as messages may show it: without a password."""
    if place is None:
        return "memory"
    return make_url(place).render_as_string(hide_password=True) if "://" in place else place.removeprefix(_JOURNAL)


def reason(error: BaseException) -> str:
    """What a database says is wrong, in one line; Optuna's own errors only say that something is."""
    if isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    said = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
    return said.splitlines()[0].rstrip(".")


def _journal(path: Path, setting: str) -> BaseStorage:
    _make_folder(path, setting)
    try:
        _mend(path, setting)
        return JournalStorage(JournalFileBackend(str(path)))
    except OSError as error:
        raise SearchError(f"{setting}={path} cannot be opened: {error}. Give another place.") from error
    except (ValueError, KeyError) as error:
        raise SearchError(f"{setting}={path} is damaged ({error}). Move it away, or give another place.") from error


def _make_folder(path: Path, setting: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SearchError(f"{setting}: {path} cannot be made: {error}. Give another place.") from error


def _mend(path: Path, setting: str) -> None:
    """Cuts off a last line that a process died in; with more lines behind it, the journal could not be read."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        first = file.readline()
    try:
        known = "op_code" in json.loads(first)
    except (ValueError, TypeError):
        known = False
    if not known:
        raise SearchError(
            f"{setting}={path} is a file, but no journal of a study. Give a new file; an SQLite file is "
            f"sqlite:///{path}."
        )
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        with path.open("rb+") as file:
            content = file.read()
            if not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
    finally:
        lock.release()


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
            return RDBStorage(url, engine_kwargs=engine)
        except ImportError as error:
            missing = getattr(error.__cause__, "name", None) or "its module"
            raise SearchError(
                f"{setting}={shown(url)} needs a driver that is not installed: {missing}. For PostgreSQL: "
                "pip install '.[postgresql]' in a checkout."
            ) from error
        except (SQLAlchemyError, RuntimeError) as error:
            # Processes that start together make the tables together, and all but one of them fail.
            if attempt == _ATTEMPTS:
                raise SearchError(f"{setting}={shown(url)} cannot be opened: {reason(error)}.") from error
            time.sleep(0.2 * attempt)
    raise AssertionError("unreachable")
