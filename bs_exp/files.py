"""Writing and reading of single files: written whole or not at all, never through a link, read only if regular."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Windows lacks the two flags; there 0 changes nothing.
_CREATE = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
_MOST_BYTES = 256 * 2**20


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a fresh empty file beside `path`, which replaces `path` if the block ends without an error.

    The folder must exist. The file gets the mode that the umask gives to new files, and is synced to the disk before it
    is renamed. A link at `path` is replaced, not followed. After an error or an interrupt the temporary file is deleted
    and `path` is as it was; only a killed process leaves `.NAME.*.tmp` behind. Raises OSError.
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
    finally:
        with suppress(OSError):  # renamed, or in a folder that is gone
            temporary.unlink()


def write_file(path: Path, content: str | bytes) -> None:
    """Writes the content, text as UTF-8; `path` holds the old or the new content at every moment. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def read_text(path: Path) -> str:
    """The UTF-8 text of a regular file; line ends stay as they are.

    Raises OSError for anything else (a pipe or a device would block or never end) and for more than 256 MiB, and
    UnicodeDecodeError.
    """
    with os.fdopen(os.open(path, _READ), "rb") as file:
        found = os.fstat(file.fileno())
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        if found.st_size > _MOST_BYTES:
            raise OSError(errno.EFBIG, f"Larger than {_MOST_BYTES // 2**20} MiB", str(path))
        return file.read().decode()
