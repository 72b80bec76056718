"""The processes that work on a study: who runs a trial, and whether that process still exists."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

BEAT = 30.0
"""Seconds between two heartbeats."""
SILENCE = 600.0
"""Seconds without a heartbeat after which a process of another host counts as dead: clocks differ, disks lag."""

_PID_NAMESPACE = Path("/proc/self/ns/pid")


@dataclass(frozen=True)
class Worker:
    """A process that runs trials. `host` names machine and container, `started` is its start in seconds since 1970."""

    name: str
    host: str
    process: int
    started: float

    @classmethod
    def this(cls) -> Self:
        """The process that calls, under a random name."""
        namespace = os.readlink(_PID_NAMESPACE) if _PID_NAMESPACE.is_symlink() else ""
        host = f"{socket.gethostname()} {namespace}".strip()
        return cls(secrets.token_hex(4), host, os.getpid(), psutil.Process().create_time())

    def is_gone(self, last_beat: float | None, now: float) -> bool:
        """Whether the process has ended. One of another host has if its last heartbeat is more than SILENCE ago."""
        if self.host != Worker.this().host:
            return last_beat is not None and now - last_beat > SILENCE
        try:
            process = psutil.Process(self.process)
            # Another process may have the same number by now, with another start. A zombie has ended.
            same = abs(process.create_time() - self.started) < 1.0
            return not same or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


@contextmanager
def heartbeat(beat: Callable[[float], None]) -> Iterator[None]:
    """Calls `beat` with the time, at once and every BEAT seconds in a thread, as long as the context lasts.

    Optuna's own heartbeats are for databases alone, and not for journal files.
    """
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(BEAT):
            try:
                beat(time.time())
            except (StorageInternalError, SQLAlchemyError, OSError) as error:
                # The next one may reach the storage again; if not, the trial's own writes fail.
                logging.getLogger(__name__).warning("no heartbeat in the study: %s", error)

    beat(time.time())
    thread = threading.Thread(target=go_on, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
