"""Weights & Biases: offline unless the environment says otherwise."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import wandb

from bs_exp.errors import ConfigError, TrackingError
from bs_exp.protocols import RunReport
from bs_exp.records.folder_names import run_words, words_of
from bs_exp.records.metrics import dense_ratios, is_setting
from bs_exp.records.record import FILE_NAME, RunRecord
from bs_exp.types import RankPlan
from bs_exp.validation import shown

Mode = Literal["online", "offline", "disabled"]
MODES = ("auto", "online", "offline", "disabled")
_PLAN_COLUMNS = ("matrix", "layers", "d_in", "d_out", "rank", "parameters", "predicted_loss", "loss_unit", "ridge")
_STEP = "update/step"
# Characters that an artifact's name must not hold.
_NO_NAME = re.compile(r"[^\w.-]+")


@dataclass(frozen=True, kw_only=True)
class WandbTracker:
    """One W&B run per run, with its files in the run's own folder.

    `mode="auto"` obeys WANDB_MODE, goes online if WANDB_API_KEY is set, and stays offline otherwise. `group=None`
    groups the runs of a sweep. Tags are the preset and `tags`. `log_model` adds the saved model as an artifact,
    `log_report` the record and the page that `report` makes of it. `timeout` is how long to wait for the server at the
    start, `finish_timeout` for uploads at the end, in seconds.
    """

    project: str
    entity: str | None
    group: str | None
    tags: Sequence[str]
    mode: str
    log_model: bool
    log_report: bool
    report: RunReport
    timeout: float
    finish_timeout: float

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode must be one of {', '.join(MODES)}, got {shown(self.mode)}.")
        for name, seconds in (("timeout", self.timeout), ("finish_timeout", self.finish_timeout)):
            if seconds <= 0:
                raise ConfigError(f"{name} must be above 0 seconds, got {seconds}.")
        tags = (self.tags,) if isinstance(self.tags, str) else tuple(self.tags or ())
        if wrong := [tag for tag in tags if not isinstance(tag, str) or not 1 <= len(tag) <= 64]:
            raise ConfigError(f"tags must be texts of 1 to 64 characters, got {wrong[0]!r}.")
        object.__setattr__(self, "tags", tags)

    def start(self, record: Mapping[str, Any], folder: Path) -> WandbRun:
        """Opens the run; TrackingError if W&B fails, ConfigError if `log_model` is set and save_model is not."""
        if self.log_model and not record["config"].get("save_model"):
            raise ConfigError("tracking.log_model=true uploads the saved model, so it needs save_model=true.")
        sweep = record.get("sweep") or {}
        preset = (record.get("choices") or {}).get("experiment")
        with _translated("start"):
            # The id is made from configuration and folder: a run restarted in its folder continues the same W&B run.
            run = wandb.init(
                project=self.project,
                entity=self.entity,
                group=self.group or sweep.get("id"),
                name=_name(record, folder),
                tags=list(dict.fromkeys([*([preset] if preset else []), *self.tags])),
                id=record["run_id"],
                # The chosen options by group: runs are grouped by `options.whitening` as by any setting.
                config={**record["config"], "options": dict(record.get("choices") or {})},
                dir=folder,
                mode=self._mode(),
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    init_timeout=self.timeout,
                    finish_timeout=self.finish_timeout,
                    finish_timeout_raises=True,
                ),
            )
            # Curves of the update are plotted over their own steps, not over those of the run.
            run.define_metric(_STEP, hidden=True)
            run.define_metric("update/*", step_metric=_STEP)
        return WandbRun(run, folder, self.log_model, self.report if self.log_report else None)

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
    folder: Path
    log_model: bool
    report: RunReport | None

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Logs `MODEL/METRIC`: what was measured as charts, how it was measured to the summary alone."""
        settings = {name: value for name, value in metrics.items() if is_setting(name.partition("/")[2])}
        with _translated("log"):
            self.run.summary.update(settings)
            if measured := {name: value for name, value in metrics.items() if name not in settings}:
                self.run.log(measured)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Logs plan, curves, sizes, timings and the saved model, and closes the run, whatever its status.

        Raises TrackingError if W&B fails.
        """
        summary, curves = _summary(record), _curves(record.get("update") or {}, "update")
        with _translated("finish"):
            try:
                self.run.summary.update(summary)
                if (plan := RunRecord.from_dict(record).rank_plan) is not None:
                    self.run.log({"plan": _plan_table(plan), "rank_profile": _rank_profile(plan)})
                for name, points in curves.items():
                    for step, value in points:
                        self.run.log({_STEP: step, name: value})
                if self.log_model and record.get("model_folder"):
                    self._log_model(record)
                if self.report is not None:
                    self._log_report(record, self.report)
            finally:
                self.run.finish(exit_code=0 if record["status"] == "completed" else 1)

    def _log_model(self, record: Mapping[str, Any]) -> None:
        artifact = _artifact(record, "model", {"config_hash": record["config_hash"], **record["size"]})
        _add(artifact, self.folder / record["model_folder"])
        self.run.log_artifact(artifact)

    def _log_report(self, record: Mapping[str, Any], report: RunReport) -> None:
        artifact = _artifact(record, "report", {"config_hash": record["config_hash"]})
        artifact.add_file(str(self.folder / FILE_NAME), FILE_NAME, policy="immutable", skip_cache=True)
        _add(artifact, report.write(self.folder), prefix="report/")
        self.run.log_artifact(artifact)


def _name(record: Mapping[str, Any], folder: Path) -> str:
    """`preset@ratio`, and what else sets a point of a sweep apart."""
    made = RunRecord.from_dict(record)
    words = words_of(folder.name, made.config_hash) if made.sweep else None
    return words or " ".join(run_words(made.method, made.config.get("retain_ratio")))


def _artifact(record: Mapping[str, Any], kind: str, metadata: dict[str, Any]) -> wandb.Artifact:
    # The name of the model's artifact is that of earlier versions.
    name = f"{record['name']}-{record['run_id']}" + ("" if kind == "model" else f"-{kind}")
    return wandb.Artifact(_NO_NAME.sub("-", name), type=kind, metadata=metadata)


def _add(artifact: wandb.Artifact, folder: Path, prefix: str = "") -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            # The files stay in the run folder, so W&B need not copy them.
            name = f"{prefix}{path.relative_to(folder)}"
            artifact.add_file(str(path), name, policy="immutable", skip_cache=True)


def _summary(record: Mapping[str, Any]) -> dict[str, Any]:
    named = {
        f"{part}/{name}": value for part in ("size", "timings") for name, value in (record.get(part) or {}).items()
    }
    objective = record.get("objective")
    by_metric = objective if isinstance(objective, Mapping) else {"": objective}
    named |= {f"objective/{name}".rstrip("/"): value for name, value in by_metric.items() if value is not None}
    named |= dense_ratios(record.get("metrics") or {})
    error = {"error": record["error"]["message"]} if record.get("error") else {}
    return {**named, **error, "status": str(record["status"]), "config_hash": record["config_hash"]}


def _plan_table(plan: RankPlan) -> wandb.Table:
    """One row per group, as `RankPlan.to_dict` has it."""
    groups = plan.to_dict()["groups"]
    rows = [[str(group[c]) if c == "layers" else group[c] for c in _PLAN_COLUMNS] for group in groups]
    return wandb.Table(columns=list(_PLAN_COLUMNS), data=rows)


def _rank_profile(plan: RankPlan) -> Any:
    """Rank over depth, a line per matrix type; a matrix that stays dense has its full rank. Of experts, the largest."""
    lines: dict[str, dict[int, int]] = {}
    for planned in plan.groups:
        group = planned.group
        rank = min(group.d_in, group.d_out) if planned.rank is None else planned.rank
        line = lines.setdefault(group.matrix, {})
        line.update({block: max(rank, line.get(block, 0)) for block in group.blocks})
    ordered = {matrix: dict(sorted(ranks.items())) for matrix, ranks in lines.items()}
    return wandb.plot.line_series(
        xs=[list(ranks) for ranks in ordered.values()],
        ys=[list(ranks.values()) for ranks in ordered.values()],
        keys=list(ordered),
        title="Rank by layer",
        xname="layer",
    )


def _curves(report: Mapping[str, Any], prefix: str) -> dict[str, list[tuple[int, float]]]:
    """The lists of [step, value] pairs in an update's report, by `prefix` and their path in the report."""
    found: dict[str, list[tuple[int, float]]] = {}
    for name, value in report.items():
        match value:
            case Mapping():
                found |= _curves(value, f"{prefix}/{name}")
            case [[int(), int() | float()], *_] if all(len(point) == 2 for point in value):
                found[f"{prefix}/{name}"] = [(step, number) for step, number in value]
    return found


@contextmanager
def _translated(action: str) -> Iterator[None]:
    try:
        yield
    # W&B's errors share no base class, and some that follow the death of its service are private. No failure of the
    # tracker may end the run; the caller turns this error into a note, and the record holds all results.
    except Exception as error:
        raise TrackingError(f"W&B could not {action} ({type(error).__name__}: {error}).") from error
