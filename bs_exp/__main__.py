"""Command line: `python -m bs_exp`, or `bs-exp` where the package is installed."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType

import hydra
from omegaconf import DictConfig

from bs_exp.config import build, describe, explain, root_folder
from bs_exp.journal import Journal
from bs_exp.recording import Recorder
from bs_exp.report import print_report

_FULL_ERROR = "HYDRA_FULL_ERROR"


class ErrorPrinter:
    """Shows an error once: its message first, and the traceback where asked for."""

    def __init__(self) -> None:
        self.tracebacks = False
        self._shown: BaseException | None = None

    def show(self, error: BaseException) -> None:
        """Prints an error that was not shown before."""
        if error is self._shown:
            return
        self._shown = error
        print(f"error: {explain(error)}", file=sys.stderr)
        if self.tracebacks:
            traceback.print_exception(error)
        # Hydra keeps the exception of a failed job; without this, its frames would keep the job's models alive.
        traceback.clear_frames(error.__traceback__)


_errors = ErrorPrinter()


@hydra.main(version_base="1.3", config_path=str(root_folder() / "conf"), config_name="config")
def run(cfg: DictConfig) -> float | None:
    """One run; returns its objective to a sweeper."""
    _errors.tracebacks |= bool(cfg.debug)
    try:
        return _run(cfg)
    except BaseException as error:
        # Shown at once: Hydra goes on with the other jobs of a sweep, and tells of failures at the end.
        _errors.show(error)
        raise


def _run(cfg: DictConfig) -> float | None:
    record, folder = describe(cfg)
    with Recorder(record, folder, Journal()) as recorder:
        with recorder.journal.stage("configure"):
            experiment = build(cfg)
        objective = experiment.run(recorder)
    print_report(recorder.record, folder)
    return objective


def _stop(signum: int, frame: FrameType | None) -> None:
    # As Ctrl-C does: the record says how the run ended, and no file is left half-written.
    raise SystemExit(128 + signum)


def main() -> None:
    """Entry point; exits with a status other than 0 if anything failed."""
    _errors.tracebacks = os.environ.get(_FULL_ERROR) == "1"
    # Hydra then hands errors on, instead of printing them in its own way.
    os.environ[_FULL_ERROR] = "1"
    signal.signal(signal.SIGTERM, _stop)
    try:
        run()
    except SystemExit:
        raise
    except BaseException as error:  # the outermost frame: nothing is swallowed, the process ends here
        _errors.show(error)
        sys.exit(128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1)


if __name__ == "__main__":
    main()
