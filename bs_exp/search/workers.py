"""Who works on a study, and who no longer does."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

BEAT = 30.0
"""Seconds between two signs of life."""
SILENCE = 600.0
"""Seconds without one after which a process elsewhere counts as gone: clocks differ, and file systems lag."""

_PID_NAMESPACE = Path("/proc/self/ns/pid")


@dataclass(frozen=True)
class Worker:
    """A process that runs trials. `host` names the machine and container: process numbers mean nothing elsewhere."""

    name: str
    host: str
    process: int
    started: float

    @classmethod
    def this(cls) -> Self:
        """The process that asks."""
        namespace = os.readlink(_PID_NAMESPACE) if _PID_NAMESPACE.is_symlink() else ""
        return cls(
            name=secrets.token_hex(4),
            host=f"{socket.gethostname()} {namespace}".strip(),
            process=os.getpid(),
            started=psutil.Process().create_time(),
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def is_gone(self, last_beat: float | None, now: float) -> bool:
        """Whether it will never finish what it began: looked up on this host, judged by its silence elsewhere."""
        if self.host != Worker.this().host:
            return last_beat is not None and now - last_beat > SILENCE
        try:
            process = psutil.Process(self.process)
            # A number is given again: the start tells whose it is. A zombie is dead, and not buried yet.
            same = abs(process.create_time() - self.started) < 1.0
            return not same or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


class Heartbeat:
    """Calls `beat` with the time, at once and every `BEAT` seconds, as long as the context lasts."""

    def __init__(self, beat: Callable[[float], None]) -> None:
        self._beat = beat
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._beat(time.time())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _go_on(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self._beat(time.time())
            except (StorageInternalError, SQLAlchemyError, OSError) as error:
                # The next beat may reach the storage again; one that stays away fails the trial's own writes.
                logging.getLogger(__name__).warning("no sign of life in the study: %s", error)
