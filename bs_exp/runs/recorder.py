"""The record of a run under way: written from the start, updated, and closed however the run ends."""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bs_exp import processes
from bs_exp.errors import RecordError, TrackingError
from bs_exp.progress import Progress
from bs_exp.protocols import TrackedRun, Tracker
from bs_exp.records.record import FILE_NAME, RunRecord, Status, utc_now, write_record
from bs_exp.runs import environment
from bs_exp.tracking.none import NullTrackedRun


def new_record(
    *,
    name: str,
    config: Mapping[str, Any],
    config_hash: str,
    folder: Path,
    choices: Mapping[str, str] | None = None,
    sweep: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> RunRecord:
    """The record with which a run begins."""
    # Same settings in the same folder: the same run, started again.
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
    return RunRecord(
        name=name,
        run_id=f"{config_hash[:8]}-{place[:8]}",
        status=Status.RUNNING,
        started=utc_now(),
        command=tuple(sys.orig_argv),
        config=config,
        config_hash=config_hash,
        process=os.getpid(),
        choices=choices or {},
        sweep=sweep,
        provenance=provenance or {},
        versions=environment.versions(),
        source=environment.source(),
        hardware=environment.hardware(),
    )


class Recorder:
    """Keeps the record of a run on disk and in the tracker; a context that notes how the run ended.

    Errors, Ctrl-C and exits are recorded and raised again.
    """

    def __init__(self, record: RunRecord, folder: Path, progress: Progress) -> None:
        self.record = record
        self.folder = folder
        self.progress = progress
        self._tracked: TrackedRun = NullTrackedRun()

    def update(self, **changes: Any) -> None:
        """Replaces fields of the record and writes it, with the progress's timings and notes."""
        timings = {name: round(seconds, 4) for name, seconds in self.progress.timings.items()}
        self.record = replace(self.record, timings=timings, notes=tuple(self.progress.notes), **changes)
        write_record(self.record, self.folder)

    def track(self, tracker: Tracker) -> None:
        """Starts the tracker; if it cannot be started, a note says so and the run goes on without it."""
        try:
            self._tracked = tracker.start(self.record.to_dict(), self.folder)
        except TrackingError as error:
            self._untrack(error)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Sends metrics to the tracker."""
        try:
            self._tracked.log(metrics)
        except TrackingError as error:
            self._untrack(error)

    def __enter__(self) -> Self:
        self.update()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.update(status=Status.COMPLETED, finished=utc_now())
            else:
                self._record_failure(error)
        finally:
            self._close_tracker()

    def _record_failure(self, error: BaseException) -> None:
        # Exceptions outside Exception (KeyboardInterrupt, SystemExit) are orders to stop, not failures.
        status = Status.FAILED if isinstance(error, Exception) else Status.INTERRUPTED
        try:
            self.update(status=status, finished=utc_now(), error=self._describe(error))
            # What helps the first process writes into a folder that goes with it.
            if processes.is_first():
                error.add_note(f"Recorded in {self.folder / FILE_NAME}")
        except RecordError as unwritten:  # what ended the run matters more than the record of it
            error.add_note(str(unwritten))

    def _describe(self, error: BaseException) -> dict[str, Any]:
        return {
            "type": type(error).__name__,
            "message": "\n".join([str(error), *getattr(error, "__notes__", [])]),
            "stage": self.progress.current,
            "traceback": "".join(traceback.format_exception(error)),
        }

    def _close_tracker(self) -> None:
        tracked, self._tracked = self._tracked, NullTrackedRun()
        try:
            tracked.finish(self.record.to_dict())
        except TrackingError as error:
            self._untrack(error)
            self.update()

    def _untrack(self, error: TrackingError) -> None:
        self._tracked = NullTrackedRun()
        self.progress.note(f"{error} The run goes on without tracking; its record holds everything.")
