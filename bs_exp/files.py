"""Writing and reading of single files: written whole or not at all, never through a link, read only if regular.

What killed processes left half-written is removed later (`remove_leftovers`).
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Windows lacks the two flags; there 0 changes nothing.
_CREATE = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
_MOST_BYTES = 256 * 2**20
# File systems allow 255 bytes; some stay for what is added to a name.
_LONGEST_NAME = 200
_DAY = 24 * 3600.0
_TEMPORARY_FILE = re.compile(r"\..{1,40}\.[0-9a-f]{16}\.tmp", re.DOTALL)
# As `tempfile` names them, after the prefix of `scratch_prefix`.
_TEMPORARY_FOLDER = r"[a-z0-9_]{8}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a fresh empty file beside `path`, which replaces `path` if the block ends without an error.

    The folder must exist. The file gets the mode that the umask gives to new files, and is synced to the disk before it
    is renamed. A link at `path` is replaced, not followed. After an error or an interrupt the temporary file is deleted
    and `path` is as it was; only a killed process leaves `.NAME.*.tmp` behind. Raises OSError, which names a file also
    where the system does not (a full disk).
    """
    # A part of the name says whose leftover a temporary file is; the whole could exceed what a file system allows.
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, _CREATE, 0o666)
    try:
        try:
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        finally:
            os.close(descriptor)
        yield temporary
        temporary.chmod(mode)  # some writers (safetensors) put a file of their own in its place
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # renamed, or in a folder that is gone
            temporary.unlink()


def write_file(path: Path, content: str | bytes) -> None:
    """Writes the content, text as UTF-8; `path` holds the old or the new content at every moment. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_leftovers(folder: Path, *, older_than: float = _DAY) -> None:
    """Removes temporary files that killed processes left in a folder `older_than` seconds ago or earlier.

    Others may be writing at this moment: only who holds the folder alone may ask for 0 seconds. What cannot be removed
    stays.
    """
    for name in _names(folder):
        if _TEMPORARY_FILE.fullmatch(name) and _is_old(path := folder / name, stat.S_ISREG, older_than):
            with suppress(OSError):
                path.unlink()


def scratch_prefix(folder: Path) -> str:
    """What the names of temporary folders begin with in which a new `folder` is made, before it is renamed."""
    return f".{folder.name}-"


def remove_scratch(folder: Path, *, older_than: float = _DAY) -> None:
    """Removes temporary folders beside `folder` that killed processes left; those of others are told by their age.

    They hold `new`, and `old` where the process was killed while it exchanged the two: this is put back.
    """
    pattern = re.compile(re.escape(scratch_prefix(folder)) + _TEMPORARY_FOLDER)
    for name in _names(folder.parent):
        path = folder.with_name(name)
        if not (pattern.fullmatch(name) and _is_old(path, stat.S_ISDIR, older_than)):
            continue
        if set(_names(path)) <= {"new", "old"}:
            with suppress(OSError):
                if not folder.exists():
                    (path / "old").rename(folder)
            shutil.rmtree(path, ignore_errors=True)


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by its path within it (with `/`), in alphabetical order; links excluded."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _is_old(path: Path, kind: Callable[[int], bool], seconds: float) -> bool:
    """Whether a path itself, not what it links to, is of a kind and was changed so many seconds ago or earlier."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return kind(found.st_mode) and time.time() - found.st_mtime >= seconds


def name_fault(name: str) -> str | None:
    """Why a text cannot name a file or folder that stays, and is seen, in the folder it is put in; None if it can."""
    if not name.strip():
        return "is empty"
    if name.startswith("."):
        return "begins with a dot"
    if any(sign in "/\\" or not sign.isprintable() for sign in name):
        return "holds a slash, a backslash or a character that cannot be printed"
    if len(name.encode()) > _LONGEST_NAME:
        return f"is longer than {_LONGEST_NAME} bytes"
    return None


def read_text(path: Path, *, most_bytes: int = _MOST_BYTES) -> str:
    """The UTF-8 text of a regular file; line ends stay as they are.

    Raises OSError for anything else (a pipe or a device would block or never end) and for more than `most_bytes` (256
    MiB), and UnicodeDecodeError.
    """
    with os.fdopen(os.open(path, _READ), "rb") as file:
        found = os.fstat(file.fileno())
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        # Files of some kinds (/proc) do not tell their size.
        if found.st_size > most_bytes or len(content := file.read(most_bytes + 1)) > most_bytes:
            raise OSError(errno.EFBIG, f"Larger than {most_bytes / 2**20:g} MiB", str(path))
        return content.decode()
