"""Whose results a folder holds: those of one study, so that no other search overwrites its tables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bs_exp.errors import SearchError
from bs_exp.files import read_text, write_file
from bs_exp.search.storage import file_of, locked, shown
from bs_exp.search.study import Identity, differences

FILE_NAME = "study.json"


@contextmanager
def signed(folder: Path, *, study: str, storage: str | None, identity: Identity) -> Iterator[None]:
    """Locks the folder; when the block has opened the study, a new folder gets a study.json that names the study.

    Raises SearchError, before the block is entered, if the folder holds the results of another study.
    """
    ours: dict[str, Any] = {
        "study_name": study,
        "storage": _beside(storage, folder),
        "identity": asdict(identity),
    }
    with locked(folder):
        found = _read(folder / FILE_NAME)
        if found is not None:
            different = differences(found["identity"], ours["identity"])
            different += [
                f"hydra.sweeper.{field}: {found[field]} in the folder, {ours[field]} now"
                for field in ("study_name", "storage")
                if found[field] != ours[field]
            ]
            if different:
                lines = "\n  ".join(different)
                raise SearchError(
                    f"{folder} belongs to another search, whose tables would be lost: study {found['study_name']!r} in "
                    f"{found['storage']}. What differs:\n  {lines}\nSet these as they were to go on with it. A new "
                    "search takes a folder of its own: hydra.sweep.dir=NEW, and hydra.sweeper.study_name=NEW where "
                    "both are kept in one storage."
                )
        yield
        if found is None:
            write_files(folder, {FILE_NAME: json.dumps(ours, indent=2) + "\n"})


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Writes contents by file name, each whole or not at all. Raises SearchError."""
    for name, content in files.items():
        try:
            write_file(folder / name, content)
        except OSError as error:
            raise SearchError(
                f"Cannot write {folder / name}: {error}. Free some space, or set hydra.sweep.dir."
            ) from error


def _beside(storage: str | None, folder: Path) -> str:
    """The storage as seen from the folder, which can be moved together with its files; without a password."""
    file = file_of(storage)
    if storage is None or file is None:
        return shown(storage)
    scheme = "sqlite:///" if "://" in storage else ""
    return scheme + os.path.relpath(file, folder)


def _read(path: Path) -> dict[str, Any] | None:
    """The content of study.json; None if there is no such file."""
    try:
        found = json.loads(read_text(path))
        return {"study_name": found["study_name"], "storage": found["storage"], "identity": dict(found["identity"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SearchError(
            f"{path} does not say whose results lie there ({error!r}). Give another hydra.sweep.dir, or remove the "
            "file if they are those of this search."
        ) from error
