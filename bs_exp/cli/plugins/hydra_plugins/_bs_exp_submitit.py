"""Points as jobs of submitit: `hydra/launcher=submitit_slurm` and `hydra/launcher=submitit_local`.

The launchers of hydra-submitit-launcher end with the first job that leaves no result, such as one that was cancelled or
took too much memory, while the others still run. These wait for all, and such a job is a failed point like any other.
Hydra imports no module with a leading underscore by itself: this one needs the extra `cluster`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_submitit_launcher import submitit_launcher
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from omegaconf import DictConfig, OmegaConf

from bs_exp.errors import LaunchError
from bs_exp.records.sweep import shown_settings

if TYPE_CHECKING:
    import submitit


class _Waiting(Launcher):
    """Waits for the jobs of a launcher of hydra-submitit-launcher, which is what each job runs: it knows no other."""

    def __init__(self, job: submitit_launcher.BaseSubmititLauncher) -> None:
        self._job = job

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._job.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submits a job per point as one array; what each returned, once all have ended."""
        import submitit  # at every start of the command otherwise

        cluster, params = self._job._EXECUTOR, dict(self._job.params)
        made = {f"{cluster}_{key}": params.pop(key) for key in ("max_num_timeout",) if key in params}
        executor = submitit.AutoExecutor(folder=params.pop("submitit_folder"), cluster=cluster, **made)
        common = set(OmegaConf.structured(BaseQueueConf))
        executor.update_parameters(**{key if key in common else f"{cluster}_{key}": v for key, v in params.items()})
        Path(str(self._job.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        jobs = executor.map_array(
            self._job,
            [list(point) for point in job_overrides],
            ["hydra.sweep.dir" for _ in numbers],
            list(numbers),
            [f"job_id_for_{number}" for number in numbers],
            [Singleton.get_state() for _ in numbers],
        )
        return [_result(job, point) for job, point in zip(jobs, job_overrides, strict=True)]


class SlurmLauncher(_Waiting):
    """A job array on a SLURM cluster; conf/hydra/launcher/submitit_slurm.yaml."""

    def __init__(self, **params: Any) -> None:
        super().__init__(submitit_launcher.SlurmLauncher(**params))


class LocalLauncher(_Waiting):
    """Processes of this machine; conf/hydra/launcher/submitit_local.yaml."""

    def __init__(self, **params: Any) -> None:
        super().__init__(submitit_launcher.LocalLauncher(**params))


def _result(job: submitit.Job[Any], overrides: Sequence[str]) -> JobReturn:
    """What a job returned, once it has ended; a failure if it returned nothing."""
    from submitit.core.utils import UncompletedJobError

    error = job.exception()
    if error is None:
        found: JobReturn = job.results()[0]
        # Told within the job, when its time was up for the last time.
        if not isinstance(found._return_value, UncompletedJobError):
            return found
        error = found._return_value
        told = f"Job {job.job_id} did not end: {error}"
    else:
        told = f"Job {job.job_id} left no result (state: {job.state})."
    failure = LaunchError(
        f"{told} Its point: {' '.join(shown_settings(overrides))}\nWhat it wrote: {job.paths.stderr}. Where memory or "
        "time was too short, raise hydra.launcher.mem_gb or hydra.launcher.timeout_min."
    )
    failure.__cause__ = error
    return JobReturn(overrides=overrides, status=JobStatus.FAILED, _return_value=failure)
