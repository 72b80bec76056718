"""Processes killed at chosen events: before a file is touched, in the middle of a write, in a step of a search.

A server that has imported everything forks them, so that hundreds cost little. What they run is the program itself.
"""

from __future__ import annotations

import fcntl
import io
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
import sqlalchemy
import transformers.models.llama.modeling_llama  # noqa: F401
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    BruteForceSampler,
    CmaEsSampler,
    GPSampler,
    GridSampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)

import bs_exp.evaluation.perplexity
import bs_exp.models.tiny
import bs_exp.pipeline
import bs_exp.reporting.report
import bs_exp.runs.experiment  # noqa: F401
from bs_exp.__main__ import main
from tests.support.searches import GRID, Runner, search

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.support.deaths"])
KILLED = -signal.SIGKILL
OVERSIZED = -signal.SIGXFSZ

LINE = {"x": FloatDistribution(-1.0, 1.0), "n": IntDistribution(0, 2)}
ENUMERATING = ("brute force", "grid")
SAMPLERS = (*ENUMERATING, "random", "tpe", "cmaes", "gp", "nsga2")
# Steps of a search, by the functions in which its process is found; the first that is in the stack counts.
_STEPS = {
    "Study.ask": "ask",
    "SharedStudy._drop": "drop",
    "SharedStudy._release_abandoned": "release",
    "Study.tell": "tell",
    "SharedStudy.end": "result",
    "SharedStudy.claim": "signature",
    "SharedStudy.beat": "heartbeat",
    "open_study": "open",
    "Search._save": "tables",
}
STEPS = (*_STEPS.values(), "run")


@dataclass(frozen=True)
class BeforeFile:
    """Killed before a file of a kind is opened for writing, renamed, made or removed the `nth` time, from 1 on."""

    kind: str
    nth: int

    def arm(self, folder: Path) -> None:
        """Watches the files below the folder, from now on, in this process."""
        left = self.nth

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if (path := _touched(event, arguments)) is not None and kind_of(path, folder) == self.kind:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


@dataclass(frozen=True)
class InsideWrite:
    """Killed by the kernel in the first write that would make any file larger than `size` bytes, and cut off there."""

    size: int

    def arm(self, folder: Path) -> None:
        """From now on, in this process."""
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


@dataclass(frozen=True)
class FullDisk:
    """Not killed: every write beyond `size` bytes of a file fails, as on a full disk."""

    size: int

    def arm(self, folder: Path) -> None:
        """From now on, in this process."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


class InStep:
    """Killed in a step of a search, before its `nth` write to the study (for `tables`, to any file), from 1 on."""

    def __init__(self, step: str, nth: int) -> None:
        self.step, self.left = step, nth

    def arm(self, folder: Path) -> None:
        """Watches the journal and the database, from now on, in this process."""

        def touch(event: str, arguments: tuple[Any, ...]) -> None:
            path = _touched(event, arguments)
            if path is not None and (path.endswith("study.journal") or self.step == "tables"):
                self.reach(_step(sys._getframe(1)))

        def execute(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
            if statement.lstrip().split(None, 1)[0] in ("INSERT", "UPDATE", "DELETE"):
                self.reach(_step(sys._getframe(1)))

        def commit(connection: Any) -> None:
            self.reach(_step(sys._getframe(1)))

        sys.addaudithook(touch)
        sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", execute)
        sqlalchemy.event.listen(sqlalchemy.Engine, "commit", commit)

    def reach(self, step: str | None) -> None:
        """The process is in this step."""
        if step == self.step:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


Death = BeforeFile | InsideWrite | FullDisk | InStep


def kind_of(path: str, folder: Path) -> str | None:
    """What a file below the folder holds: cache, model, record, plan, lock or other; None for one elsewhere."""
    place = Path(os.path.abspath(path))
    if not place.is_relative_to(folder):
        return None
    parts = place.relative_to(folder).parts
    if "cache" in parts:
        return "cache"
    if any(part == "model" or part.startswith(".model") for part in parts):
        return "model"
    name = parts[-1] if parts else ""
    for kind, sign in (("record", "record.json"), ("plan", "sweep.json"), ("lock", "lock"), ("lock", "owner")):
        if sign in name:
            return kind
    return "other"


def _touched(event: str, arguments: tuple[Any, ...]) -> str | None:
    """The path that an audit event is about to change; None for other events."""
    match event:
        case "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not writes and not (isinstance(mode, str) and set(mode) & set("wax+")):
                return None
        case "os.rename" | "os.remove" | "os.mkdir" | "os.rmdir" | "os.chmod" | "os.truncate":
            path = arguments[0]
        case _:
            return None
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else None


def _step(frame: FrameType | None) -> str | None:
    names = set()
    while frame is not None:
        names.add(frame.f_code.co_qualname)
        frame = frame.f_back
    return next((step for name, step in _STEPS.items() if name in names), None)


class Command:
    """The command line in a process of its own. What it prints goes through a pipe, which knows no full disk."""

    def __init__(self, arguments: Sequence[str], folder: Path, log: Path, death: Death | None) -> None:
        reader, writer = _SERVER.Pipe(duplex=False)
        self._process = _start(_command, tuple(arguments), folder.absolute(), writer, death)
        writer.close()
        self._copier = threading.Thread(target=_copy, args=(reader, log), daemon=True)
        self._copier.start()

    @property
    def exitcode(self) -> int | None:
        return self._process.exitcode

    def join(self, timeout: float | None = None) -> None:
        """Waits for the end, and for all that was printed."""
        self._process.join(timeout)
        if self.exitcode is not None:
            self._copier.join(10)

    def kill(self) -> None:
        self._process.kill()


def _copy(reader: Connection, log: Path) -> None:
    with reader, log.open("ab", buffering=0) as file:
        while part := os.read(reader.fileno(), 65536):
            file.write(part)


def start_command(arguments: Sequence[str], folder: Path, log: Path, death: Death | None = None) -> Command:
    """Starts the command line in a folder; what it prints is added to `log`."""
    return Command(arguments, folder, log, death)


def start_worker(folder: Path, storage: str, sampler: str, seconds: float, death: Death | None = None) -> BaseProcess:
    """Starts a process that takes part in a search of six trials, of `seconds` each."""
    return _start(_take_part, folder, storage, sampler, seconds, death)


def _start(target: Any, *arguments: Any) -> BaseProcess:
    process = _SERVER.Process(target=target, args=arguments)
    process.start()
    return process


def end(process: BaseProcess | Command, seconds: float) -> int | None:
    """The exit code of a process; None, and it is killed, if it has not ended after `seconds`."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


def _command(arguments: tuple[str, ...], folder: Path, writer: Connection, death: Death | None) -> None:
    os.chdir(folder)
    _print_to(writer.fileno())
    sys.argv = ["bs_exp", *arguments]
    if death is not None:
        death.arm(folder)
    main()


def _print_to(descriptor: int) -> None:
    """Sends what the process prints there; line by line, since what a buffer holds does not survive a kill."""
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(stream, "w", closefd=False), encoding="utf-8", line_buffering=True)
        for stream in (1, 2)
    )


def space_of(sampler: str) -> Mapping[str, BaseDistribution]:
    """The space that a worker searches: six points for samplers that enumerate it."""
    return GRID if sampler in ENUMERATING else LINE


def value_of(point: Mapping[str, Any]) -> float:
    """What a point is worth: another number for every point."""
    return float(point["n"]) + (0.5 * (point["c"] == "b") if "c" in point else float(point["x"]) / 4)


def make_sampler(name: str) -> BaseSampler:
    """A sampler, with few random trials before it learns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        match name:
            case "brute force":
                return BruteForceSampler(seed=0)
            case "grid":
                return GridSampler({"n": [0, 1, 2], "c": ["a", "b"]}, seed=0)
            case "tpe":
                return TPESampler(seed=0, n_startup_trials=2)
            case "cmaes":
                return CmaEsSampler(seed=0, n_startup_trials=1, warn_independent_sampling=False)
            case "gp":
                return GPSampler(seed=0, n_startup_trials=3)
            case "nsga2":
                return NSGAIISampler(seed=0, population_size=3)
            case _:
                return RandomSampler(seed=0)


def _take_part(folder: Path, storage: str, sampler: str, seconds: float, death: Death | None) -> None:
    """Leaves `ran-POINT-...` when a run of a point ends, and `twice-POINT-...` if another process was running it."""
    _print_to(os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666))
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def run(point: Mapping[str, Any]) -> tuple[float, ...]:
        name = "-".join(f"{value}" for value in point.values())
        mark = f"{name}-{os.getpid()}-{time.monotonic_ns()}"
        # The lock ends with the process.
        with (folder / f"lock-{name}").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                (folder / f"twice-{mark}").touch()
            time.sleep(seconds)
            if isinstance(death, InStep):
                death.reach("run")
            (folder / f"ran-{mark}").touch()
        return (value_of(point),)

    if death is not None:
        death.arm(folder)
    search(
        folder,
        storage=storage,
        n_trials=6,
        distributions=space_of(sampler),
        sampler=make_sampler(sampler),
        settings={"seed": 0},
    ).run(Runner(run))
