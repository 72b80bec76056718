"""Weights & Biases: offline unless the environment says otherwise."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import wandb

from bs_exp.errors import ConfigError, TrackingError

Mode = Literal["online", "offline", "disabled"]
MODES = ("auto", "online", "offline", "disabled")
_PLAN_COLUMNS = ("matrix", "layers", "d_in", "d_out", "rank", "parameters", "predicted_loss", "ridge")


@dataclass(frozen=True, kw_only=True)
class WandbTracker:
    """One W&B run per run, with its files in the run's own folder.

    `mode="auto"` obeys WANDB_MODE, goes online if WANDB_API_KEY is set, and stays offline otherwise. `group=None`
    groups the runs of a sweep. `timeout` is how long to wait for the server, in seconds.
    """

    project: str
    entity: str | None
    group: str | None
    mode: str
    timeout: float

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}.")
        if self.timeout <= 0:
            raise ConfigError(f"timeout must be above 0 seconds, got {self.timeout}.")

    def start(self, record: Mapping[str, Any], folder: Path) -> WandbRun:
        """Opens the run; TrackingError if W&B refuses."""
        sweep = record.get("sweep") or {}
        with _translated("start"):
            # The id follows from configuration and folder: a run that starts again in its folder goes on here.
            run = wandb.init(
                project=self.project,
                entity=self.entity,
                group=self.group or sweep.get("id"),
                name=record["name"],
                id=record["run_id"],
                config=dict(record["config"]),
                dir=folder,
                mode=self._mode(),
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(silent=True, console="off", init_timeout=self.timeout),
            )
        return WandbRun(run)

    def _mode(self) -> Mode | None:
        if self.mode != "auto":
            return self.mode  # type: ignore[return-value]  # one of MODES
        if "WANDB_MODE" in os.environ:
            return None  # W&B reads it itself
        return "online" if "WANDB_API_KEY" in os.environ else "offline"


@dataclass(frozen=True)
class WandbRun:
    """An open W&B run."""

    run: wandb.Run

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Logs metrics by name."""
        with _translated("log"):
            self.run.log(dict(metrics))

    def finish(self, record: Mapping[str, Any]) -> None:
        """Logs plan, sizes and timings, and closes the run, whatever its status."""
        with _translated("finish"):
            try:
                self.run.summary.update(_summary(record))
                if record.get("plan"):
                    self.run.log({"plan": _plan_table(record["plan"])})
            finally:
                self.run.finish(exit_code=0 if record["status"] == "completed" else 1)


def _summary(record: Mapping[str, Any]) -> dict[str, Any]:
    named = {
        f"{part}/{name}": value for part in ("size", "timings") for name, value in (record.get(part) or {}).items()
    }
    return {**named, "status": str(record["status"]), "config_hash": record["config_hash"]}


def _plan_table(plan: Mapping[str, Any]) -> wandb.Table:
    rows = [[str(g[c]) if c == "layers" else g.get(c) for c in _PLAN_COLUMNS] for g in plan["groups"]]
    return wandb.Table(columns=list(_PLAN_COLUMNS), data=rows)


@contextmanager
def _translated(action: str) -> Iterator[None]:
    try:
        yield
    except (wandb.Error, OSError) as error:
        raise TrackingError(f"W&B could not {action} ({type(error).__name__}: {error}).") from error
