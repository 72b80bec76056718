"""Whose results a folder holds: those of one study, so that no other search writes its tables over them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock
from sqlalchemy.engine import make_url

from bs_exp.errors import SearchError
from bs_exp.search.storage import shown
from bs_exp.search.study import Identity, listed

FILE_NAME = "study.json"
_LOCK = ".study.lock"


@contextmanager
def signed(folder: Path, *, study: str, storage: str | None, identity: Identity) -> Iterator[None]:
    """Opens the study within: then the folder is signed for it, if it was not.

    Of searches that begin at once, one waits until the other has signed. Raises SearchError, before anything is opened,
    if the folder holds the results of another study.
    """
    ours = {"study_name": study, "storage": _beside(storage, folder), "identity": asdict(identity)}
    path = folder / FILE_NAME
    with locked(folder):
        found = _read(path)
        if found is not None and (different := [*identity.differences(found["identity"]), *_places(found, ours)]):
            raise SearchError(
                f"{folder} belongs to another search, whose tables would be lost: study {found['study_name']!r} in "
                f"{found['storage']}. What differs:\n  {listed(different)}\nSet these as they were to go on with it. A "
                "new search takes a folder of its own: hydra.sweep.dir=NEW, and hydra.sweeper.study_name=NEW where "
                "both are kept in one storage."
            )
        yield
        if found is None:
            _write(path, ours)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes of the search from writing into its folder."""
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
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


def _places(found: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    for field in ("study_name", "storage"):
        if found[field] != ours[field]:
            yield f"hydra.sweeper.{field}: {found[field]} in the folder, {ours[field]} now"


def _beside(storage: str | None, folder: Path) -> str:
    """The storage as seen from the folder, which can be moved together with its files; without a password."""
    place = shown(storage)
    if storage is None:
        return place
    if "://" not in storage:
        return os.path.relpath(place or ".", folder)
    url = make_url(storage)
    is_file = url.get_backend_name() == "sqlite" and url.database
    return f"sqlite:///{os.path.relpath(str(url.database), folder)}" if is_file else place


def _read(path: Path) -> dict[str, Any] | None:
    """What the folder is signed with; None if it is not."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"study_name": found["study_name"], "storage": found["storage"], "identity": dict(found["identity"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SearchError(
            f"{path} does not say whose results lie there ({error!r}). Give another hydra.sweep.dir, or remove the "
            "file if they are those of this search."
        ) from error


def _write(path: Path, ours: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise SearchError(f"Cannot write {path}: {error}. Free some space, or set hydra.sweep.dir.") from error
