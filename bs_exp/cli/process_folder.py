"""Where the processes of a run write that are started beside the first one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bs_exp import processes
from bs_exp.errors import ConfigError

_SWEEP = ("-m", "--multirun")


@contextmanager
def process_folder(argv: list[str]) -> Iterator[None]:
    """Appends to `argv` what gives every process but the first a folder of its own, which goes when the run ends.

    ConfigError for a sweep, whose points would be started by each process for itself.
    """
    if processes.launched() == 1:
        yield
        return
    if any(argument in _SWEEP or argument.startswith("sweeps=") for argument in argv):
        raise ConfigError(
            f"{processes.launched()} processes were started for a sweep. They can share the work of one run: leave out "
            "-m, or start the sweep without torchrun. Points as jobs of a cluster can have several processes each: "
            "hydra/launcher=submitit_slurm hydra.launcher.tasks_per_node=2."
        )
    if processes.is_first():
        yield
        return
    with scratch_folder() as folder:
        argv += [f"hydra.run.dir={folder}", "hydra.output_subdir=null"]
        yield


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for a process that helps the first one: what it writes goes when its work is done."""
    with TemporaryDirectory(prefix="bs_exp-process-") as folder:
        yield Path(folder)
