"""A run's folder, before the run: what another run has finished there is not replaced unasked."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from bs_exp.cli.points import hash_of
from bs_exp.errors import ConfigError, RecordError
from bs_exp.records.record import FILE_NAME, MODEL_FOLDER, Status, read_record


def refuse_other_result(folder: Path, config: DictConfig) -> None:
    """ConfigError if the folder holds what a run of other settings has completed, unless `force` says so.

    The same run again, and one that failed, may be replaced.
    """
    if config.force or config.dry_run or not (folder / FILE_NAME).exists():
        return
    try:
        kept = read_record(folder)
    except RecordError:  # no result of ours that could be read
        return
    if kept.status != Status.COMPLETED or kept.config_hash == hash_of(config):
        return
    model = f" and {MODEL_FOLDER}/" if kept.model_folder is not None and (folder / MODEL_FOLDER).exists() else ""
    ratio = kept.config.get("retain_ratio")
    found = f"{kept.name} at {ratio} of {kept.started[:10]} ({FILE_NAME}{model})"
    raise ConfigError(
        f"{folder} holds a completed run of other settings, {found}. Name another folder, hydra.run.dir=FOLDER, or "
        "replace it: force=true."
    )
