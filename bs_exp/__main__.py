"""Command line: `bs-exp`, or `python -m bs_exp` where the package is not installed."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import hydra
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from bs_exp import processes
from bs_exp.cli.arguments import for_hydra
from bs_exp.cli.commands import COMMANDS, run_command
from bs_exp.cli.conf_root import root_folder
from bs_exp.cli.config import build, check_objectives, check_root
from bs_exp.cli.explain import explain
from bs_exp.cli.help import asks_for_help, help_text, version_text
from bs_exp.cli.multirun import end_sweep
from bs_exp.cli.points import describe, in_sweep
from bs_exp.cli.process_folder import process_folder, scratch_folder
from bs_exp.printable import printable_lines
from bs_exp.progress import Progress
from bs_exp.records.inputs import FILES, earlier_code
from bs_exp.records.stages import Stage
from bs_exp.records.sweep import finished_record, kept_objective, occupied, print_progress
from bs_exp.runs.terminal import print_report

if TYPE_CHECKING:
    from bs_exp.records.record import RunRecord
    from bs_exp.runs.dense_cache import DenseStore
    from bs_exp.runs.experiment import Objective

# Hydra looks for plug-ins in the namespace package `hydra_plugins`: this makes ours a part of it. It has looked already
# where it was used in this process before.
sys.path.append(str(Path(__file__).resolve().parent / "cli" / "plugins"))
Plugins.instance().register(import_module("hydra_plugins.bs_exp_optuna").OptunaSweeper)
if find_spec("hydra_plugins.hydra_submitit_launcher") is not None:  # comes with the extra `cluster`
    for launcher in ("SlurmLauncher", "LocalLauncher"):
        Plugins.instance().register(getattr(import_module("hydra_plugins._bs_exp_submitit"), launcher))

_FULL_ERROR = "HYDRA_FULL_ERROR"
# Of a scheduler, and of a terminal that is closed.
_ORDERS_TO_STOP = (signal.SIGTERM, signal.SIGHUP)


class ErrorPrinter:
    """Shows an error once: its message first, and the traceback where asked for."""

    def __init__(self) -> None:
        self.tracebacks = False
        self._shown: list[BaseException] = []

    def show(self, error: BaseException) -> None:
        """Prints an error that was not shown before."""
        if any(error is shown for shown in self._shown):
            return
        self._shown.append(error)
        # What all processes of a run say alike is said once; what one of them says for itself names it.
        who = "" if processes.is_first() else f"process {os.environ['RANK']}: "
        print(printable_lines(f"{who}error: {explain(error, sys.argv[1:])}"), file=sys.stderr)
        if self.tracebacks:
            print(printable_lines("".join(traceback.format_exception(error))), file=sys.stderr, end="")
        # Hydra keeps the exception of a failed job; without this, its frames would keep the job's models alive.
        traceback.clear_frames(error.__traceback__)


_errors = ErrorPrinter()


@hydra.main(version_base="1.3", config_path=str(root_folder() / "conf"), config_name="config")
def run(cfg: DictConfig) -> Objective:
    """One run; returns its objective to a sweeper."""
    _errors.tracebacks |= bool(cfg.debug)
    try:
        if cfg.dry_run:
            from bs_exp.cli.estimate_command import print_estimate

            print_estimate(cfg)
            return None
        return _run(cfg)
    except BaseException as error:
        # Shown at once: Hydra goes on with the other jobs of a sweep, and tells of failures at the end.
        _errors.show(error)
        if isinstance(error, Exception) and not in_sweep():
            raise SystemExit(1) from error  # Hydra would say in a line of its own that the job failed
        raise


def _run(cfg: DictConfig) -> Objective:
    _keep_few_kernels(cfg)
    from bs_exp.runs.dense_cache import DenseStore

    record, folder = describe(cfg)
    if record.sweep is not None:
        processes.take_tasks()
        with processes.joined():
            return _point(cfg, record, folder)
    with processes.joined():
        progress = Progress(quiet=not processes.is_first())
        objective, record = _work(cfg, record, folder, progress, DenseStore())
    if processes.is_first():
        print_report(record, folder)
    return objective


def _keep_few_kernels(cfg: DictConfig) -> None:
    """Bounds what oneDNN, and PyTorch above it, keep of the shapes that they met, where a model is larger than memory.

    They keep a thousand kernels. Groups with ranks of their own meet new shapes in every block and for every length of
    text, so that memory grows with depth (docs/offload.md). Both read these variables when torch is imported.
    """
    if OmegaConf.select(cfg, "model.offload", default="none") != "none":
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")
        os.environ.setdefault("LRU_CACHE_CAPACITY", "1")


def _point(cfg: DictConfig, record: RunRecord, folder: Path) -> Objective:
    """A point of a sweep, or what is kept of it."""
    from bs_exp.runs.dense_cache import OF_SWEEP

    first = processes.is_first()
    with occupied(folder) if first else scratch_folder() as place:
        kept = processes.from_first(lambda: None if cfg.force else _kept(record, folder, with_model=cfg.save_model))
        try:
            if kept is not None:
                return kept_objective(kept)
            # In a log, a line per point says enough; the record has its stages and notes.
            progress = Progress(quiet=not (first and sys.stderr.isatty()))
            return _work(cfg, record, place, progress, OF_SWEEP)[0]
        finally:
            if first:
                print_progress(folder)


def _kept(record: RunRecord, folder: Path, *, with_model: bool) -> RunRecord | None:
    """The record of the same point that was finished before, if its code and inputs were today's; says if not."""
    kept = finished_record(folder, record.config_hash, with_model=with_model, inputs=record.provenance.get(FILES, {}))
    if kept is None and (earlier := earlier_code(record, folder.parent)):
        point, changed = earlier
        print(
            f"code of {', '.join(changed)} changed since point {point} was run: it is run again, as {folder.name}.",
            file=sys.stderr,
        )
    return kept


def _work(
    cfg: DictConfig, record: RunRecord, folder: Path, progress: Progress, dense: DenseStore
) -> tuple[Objective, RunRecord]:
    """Runs what a configuration describes; returns its objective, and the record of how it ended."""
    from bs_exp.runs.recorder import Recorder

    with Recorder(record, folder, progress) as recorder:
        with progress.stage(Stage.CONFIGURE):
            check_root(cfg)
            check_objectives(cfg)
            experiment = build(cfg, dense)
            if not processes.is_first():
                experiment = experiment.as_helper()
        objective = experiment.run(recorder)
    return objective, recorder.record


def _stop(signum: int, frame: FrameType | None) -> None:
    # As Ctrl-C does: the record says how the run ended, and no file is left half-written.
    raise SystemExit(128 + signum)


def main() -> None:
    """Entry point; exits with a status other than 0 if anything failed."""
    _errors.tracebacks = os.environ.get(_FULL_ERROR) == "1"
    # Hydra then hands errors on, instead of printing them in its own way.
    os.environ[_FULL_ERROR] = "1"
    for order in _ORDERS_TO_STOP:
        signal.signal(order, _stop)
    # A terminal that lacks a character of the table gets another in its place, and not an error after all the work.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        if sys.argv[1:2] and sys.argv[1] in COMMANDS:
            run_command(sys.argv[1:])
        elif asks_for_help(sys.argv[1:]):
            print(help_text(sys.argv[1:]))
        elif "--version" in sys.argv[1:]:
            print(version_text())
        else:
            sys.argv[1:] = for_hydra(sys.argv[1:])
            with process_folder(sys.argv):
                run()
    except SystemExit as end:
        if end.__cause__ is not None:  # a setting was refused before the run had a folder
            _errors.show(end.__cause__)
        raise
    except BaseException as error:  # the outermost frame: nothing is swallowed, the process ends here
        _errors.show(error)
        sys.exit(128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1)
    finally:
        end_sweep()


if __name__ == "__main__":
    main()
