"""Hydra's multirun as a sweep on disk: its points, their folders, and the table at its end."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, read_write
from omegaconf.errors import OmegaConfBaseException

from bs_exp.cli.conf_root import root_folder
from bs_exp.cli.config import check_objectives, check_root
from bs_exp.cli.early_check import check_early
from bs_exp.cli.grid import grid, refuse, refuse_search
from bs_exp.cli.points import is_kept
from bs_exp.cli.run_folder import refuse_other_result
from bs_exp.errors import BsExpError, ConfigError
from bs_exp.files import read_text
from bs_exp.printable import printable
from bs_exp.records.record import utc_now
from bs_exp.records.sweep import PointOutcome, SweepPlan, survey
from bs_exp.runs.comparison import print_comparison
from bs_exp.runs.sweep_table import print_sweep

_FOLDER = "hydra.sweep.dir"
# Where Hydra itself keeps the settings that names of jobs leave out.
_COMMON = "hydra.job.config.override_dirname.exclude_keys"
# What Hydra, the lock of a point and a study write by name; records, plans and tables get fresh names.
_WRITTEN = (".hydra", ".hydra/*", "*.log", "multirun.yaml", ".lock", "*study*")
# By name: Hydra imports its plug-ins a second time, as classes of their own.
_GRID_SWEEPER = f"{BasicSweeper.__module__}.{BasicSweeper.__qualname__}"
_SEARCH_SWEEPER = "hydra_plugins.bs_exp_optuna.OptunaSweeper"


# The launchers' packages store a schema under the names of our option files, and Hydra does not like that it fits.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")


@dataclass
class _Current:
    """The sweep that this process started, if any."""

    folder: Path | None = None
    plan: SweepPlan | None = None
    compare: bool = False
    closing: str = ""


_current = _Current()


class SweepCallback(Callback):
    """What is done before a run or a sweep has a folder: settings of the root are checked, points written down.

    Named in `conf/config.yaml`. With `compare`, the table at the end compares methods with the dense model, and
    `closing` is printed below it. Jobs get copies of it.
    """

    def __init__(self, compare: bool = False, closing: str = "") -> None:
        self.compare, self.closing = compare, closing

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Ends a single run that a setting forbids, as far as that is known without torch; with `debug` it goes on."""
        try:
            check_root(config)
            _refuse_links(Path(config.hydra.run.dir), points=False)
            check_objectives(config)
            if "torch" not in sys.modules:  # else nothing is gained: the run checks the same
                check_early(config)
            refuse_other_result(Path(config.hydra.run.dir), config)
        except (ConfigError, OmegaConfBaseException) as error:
            if not config.debug:
                # Hydra makes a warning of every Exception of a callback. `main` shows the cause.
                raise SystemExit(1) from error

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Fixes the sweep's folder for all jobs, and announces its points.

        Ends a sweep that has no points, or one with a setting that is refused, and one whose folder holds links.
        """
        _fix_folder(config)
        _note_common_settings(config)
        folder = Path(config.hydra.sweep.dir)
        try:
            _refuse_links(folder, points=True)
            jobs = None if config.hydra.sweeper._target_ != _GRID_SWEEPER else grid(config, _settings(config))
            if jobs is not None and not jobs:
                empty = ", ".join(str(o) for o in config.hydra.overrides.task if "(" in str(o)) or "its settings"
                raise ConfigError(
                    f"the sweep has no points: {empty} gives no value. range(FROM,TO,STEP) ends before TO; name "
                    "values, as in retain_ratio=0.8,0.5."
                )
            refuse(jobs or [])
            if config.hydra.sweeper._target_ == _SEARCH_SWEEPER:
                refuse_search(config, _settings(config))
            points = None if jobs is None else tuple(job.point for job in jobs)
            plan = SweepPlan(folder.name, tuple(sys.orig_argv), utc_now(), points, sweep_claim(config))
            plan.write(folder)
        except (BsExpError, HydraException, OmegaConfBaseException) as error:
            # As in on_run_start: an Exception would become a warning.
            raise SystemExit(1) from error
        _current.folder, _current.plan = folder, plan
        _current.compare, _current.closing = self.compare, self.closing
        if jobs is not None:
            old = {state.point.folder for state in survey(folder, plan) if state.outcome is PointOutcome.KEPT}
            kept = sum(
                job.cfg is not None and job.point.folder in old and is_kept(job.cfg, folder / job.point.folder)
                for job in jobs
            )
            again = f", {kept} of them finished before" if kept else ""
            print(printable(f"sweep {folder.name}: {len(jobs)} points in {folder}{again}"), file=sys.stderr)


def sweep_claim(config: DictConfig) -> str:
    """What the sweep's file claims in the comment at its beginning; empty if there is no file, or no claim."""
    name = config.hydra.runtime.choices.get("sweeps")
    path = root_folder() / "sweeps" / f"{name}.yaml"
    if not name or not path.is_file():
        return ""
    words: list[str] = []
    for line in read_text(path).splitlines():
        text = line.removeprefix("#")
        if text == line:
            break  # the comment has ended
        if text.startswith(" Claim:"):
            words.append(text.removeprefix(" Claim:").strip())
        elif words and text.startswith("  "):
            words.append(text.strip())
        elif words:
            break
    # A run command on the line of the claim is none of it.
    return " ".join(words).partition("   Run:")[0].strip()


def end_sweep() -> None:
    """Prints the outcome of the points of this process's sweep, if it ran one, and releases the shared model."""
    folder, plan = _current.folder, _current.plan
    _current.folder = _current.plan = None
    if folder is None or plan is None:
        return
    from bs_exp.runs.dense_cache import OF_SWEEP  # imports torch, which a slip in a setting need not wait for

    OF_SWEEP.forget()
    if plan.points is not None and (states := survey(folder, plan)):
        if _current.compare:
            print_comparison(plan.name, folder, states, _current.closing)
        else:
            print_sweep(plan.name, folder, states)


def _fix_folder(config: DictConfig) -> None:
    """Makes the folder of the sweep a setting that every job inherits: a job's own overrides would change its name."""
    overrides = config.hydra.overrides.hydra
    if any(override.split("=")[0].lstrip("+") == _FOLDER for override in overrides):
        return
    quoted = str(config.hydra.sweep.dir).replace("\\", "\\\\").replace("'", "\\'")
    with read_write(config):
        overrides.append(f"{_FOLDER}='{quoted}'")


def _note_common_settings(config: DictConfig) -> None:
    """Lists for every job the settings that all points share: names of points tell the others."""
    try:
        overrides = OverridesParser.create().parse_overrides(_settings(config))
    except HydraException:
        return  # the sweeper meets the same error next, and ends with it
    keys = [str(o.key_or_group) for o in overrides if not o.is_sweep_override()]
    quoted = ",".join("'" + key.replace("'", "\\'") + "'" for key in keys)
    with read_write(config):
        config.hydra.overrides.hydra.append(f"{_COMMON}=[{quoted}]")


def _settings(config: DictConfig) -> list[str]:
    """All settings of a sweep, of its file and of the command line."""
    params = config.hydra.sweeper.get("params") or {}
    return [f"{key}={value}" for key, value in params.items()] + list(config.hydra.overrides.task)


def _refuse_links(folder: Path, *, points: bool) -> None:
    """ConfigError if a file that Hydra or a study will write in the folder of a run, or a sweep, is a link."""
    try:
        inside = sorted(folder.iterdir()) if points else []
        place = next((link for path in (folder, *inside) if (link := _link(path, inside=path != folder))), None)
    except OSError:  # there is none yet; who makes it tells what is wrong
        return
    if place is not None:
        raise ConfigError(
            f"{place} is a link, which what is written there would follow out of the folder. Remove it, or name "
            f"another folder, as in hydra.{'sweep' if points else 'run'}.dir=DIR."
        )


def _link(folder: Path, *, inside: bool) -> Path | None:
    """The folder itself, if it is a link inside of a sweep, or else the first link among what is written in it."""
    if inside and folder.is_symlink() and folder.is_dir():
        return folder
    written = [path for pattern in _WRITTEN for path in sorted(folder.glob(pattern))] if folder.is_dir() else []
    return next((path for path in written if path.is_symlink()), None)
