"""The files of a cache on disk: what they are, who reads them, and which go when space is short.

Files lie in `FOLDER/KIND/KEY.safetensors`. The time of a file's last change is that of its last use. A process notes
what it uses in a `Lease`; what is noted there is not removed by others as long as the process lives.
"""

from __future__ import annotations

import os
import secrets
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bs_exp.errors import CacheError

try:
    import fcntl
except ImportError:  # Windows: nothing is removed there
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".safetensors"
_LEASES, _LOCK = ".in-use", ".lock"
_OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)


@dataclass(frozen=True)
class CacheFile:
    """One entry of a cache on disk: its kind, its size, and when it was last used, in seconds since 1970."""

    path: Path
    kind: str
    bytes: int
    last_use: float

    @property
    def name(self) -> str:
        """KIND/KEY, as leases hold it."""
        return f"{self.kind}/{self.path.stem}"


def cache_files(folder: Path) -> list[CacheFile]:
    """All entries of a cache, the one that was not used for longest first; none if there is no such folder."""
    found = []
    for path in folder.glob(f"*/*{SUFFIX}"):
        if path.name.startswith(".") or path.parent.name.startswith("."):
            continue
        with suppress(FileNotFoundError):  # removed by another process meanwhile
            status = path.lstat()
            found.append(CacheFile(path, path.parent.name, status.st_size, status.st_mtime))
    return sorted(found, key=lambda file: (file.last_use, file.name))


class Lease:
    """The entries that a process uses, in a file that is locked as long as the process lives."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError if the folder cannot be written."""
        self._folder = folder
        self._names: set[str] = set()
        leases = folder / _LEASES
        leases.mkdir(parents=True, exist_ok=True)
        self.path = leases / f"{os.getpid()}-{secrets.token_hex(8)}"
        # A lease that is not locked yet looks like one of a dead process.
        with _locked(folder):
            self._descriptor = os.open(self.path, _OPEN | os.O_EXCL, 0o666)
            _lock(self._descriptor)
        self._end = weakref.finalize(self, _end, self.path, self._descriptor, os.getpid())

    def add(self, name: str) -> None:
        """Notes an entry (KIND/KEY). From then on it stays, if it is there."""
        if name in self._names:
            return
        with _locked(self._folder, shared=True):
            os.write(self._descriptor, f"{name}\n".encode())
        self._names.add(name)

    def give_up(self, names: Collection[str]) -> None:
        """Notes that entries are not needed any more. The caller holds the lock of the folder."""
        if given := self._names & set(names):
            self._names -= given
            os.ftruncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.write(self._descriptor, "".join(f"{name}\n" for name in self._names).encode())

    def close(self) -> None:
        """Ends the lease: others may remove what it held. It also ends with the object, and with the process."""
        self._end()


def _end(path: Path, descriptor: int, owner: int) -> None:
    if os.getpid() == owner:  # not in a child that was forked meanwhile
        with suppress(OSError):
            path.unlink()
    os.close(descriptor)


def remove(folder: Path, names: Collection[str], *, lease: Lease | None = None) -> int:
    """Removes entries (KIND/KEY) that no process uses, the owner of `lease` no more; the bytes that this freed.

    Where several processes used an entry, the last one that gives it up removes it. Nothing is removed where files
    cannot be locked (Windows).
    """
    if fcntl is None or not folder.is_dir():
        return 0
    freed = 0
    with _locked(folder):
        if lease is not None:
            lease.give_up(names)
        for name in set(names) - _in_use(folder, lease):
            path = folder / f"{name}{SUFFIX}"
            with suppress(FileNotFoundError):
                size = path.lstat().st_size
                path.unlink()
                freed += size
    return freed


def prune(folder: Path, most_bytes: int, *, lease: Lease | None = None) -> tuple[int, int]:
    """Removes entries that no process uses, the longest unused first, until at most `most_bytes` are left.

    Gives the bytes that were freed, and those that are left: more than asked for where processes use more. What the
    owner of `lease` uses stays, too.
    Raises CacheError where files cannot be locked (Windows), since it could not be known what others use.
    """
    if fcntl is None:
        raise CacheError(
            "Files of the cache cannot be locked on this system, so none is removed: use cache.max_gb=null."
        )
    if not folder.is_dir():
        return 0, 0
    files = cache_files(folder)
    left = sum(file.bytes for file in files)
    if left <= most_bytes:
        return 0, left
    freed = 0
    with _locked(folder):
        used = _in_use(folder, None)
        for file in cache_files(folder):
            if left - freed <= most_bytes:
                break
            if file.name not in used:
                freed += _unlink(file)
    return freed, left - freed


def _unlink(file: CacheFile) -> int:
    try:
        file.path.unlink()
    except FileNotFoundError:
        return 0
    return file.bytes


def _in_use(folder: Path, mine: Lease | None) -> set[str]:
    """What living processes use, `mine` left out; leases of dead processes are removed."""
    used: set[str] = set()
    for path in (folder / _LEASES).glob("*"):
        if mine is not None and path == mine.path:
            continue
        try:
            descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        except FileNotFoundError:
            continue
        try:
            if _lock(descriptor, wait=False):
                path.unlink(missing_ok=True)
            else:
                used.update(path.read_text().splitlines())
        finally:
            os.close(descriptor)
    return used


@contextmanager
def _locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Others wait: entries are noted by several at once (`shared`), and removed by one alone."""
    descriptor = os.open(folder / _LOCK, _OPEN, 0o666)
    try:
        _lock(descriptor, shared=shared)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, shared: bool = False, wait: bool = True) -> bool:
    """Locks a file until it is closed; False if another has it and this one does not wait."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
