"""Accuracy on the tasks of the LM Evaluation Harness, measured on the model in memory."""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import io
import json
import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from datasets.exceptions import DatasetsError
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from bs_exp.errors import ConfigError, DataError
from bs_exp.evaluation.shared_harness import SharedHarness
from bs_exp.models.model_inputs import check_task
from bs_exp.records import metrics as names
from bs_exp.types import LoadedModel, Task
from bs_exp.validation import check_at_least, check_seed

OWN_TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Accuracy on tasks, groups or tags of lm-eval, on `docs_cloze`, and on tasks in the folders of `include_path`.

    `limit` takes the first items of every task (a number, or a share below 1), None all; `num_fewshot=None` keeps each
    task's own number of examples in the prompt.
    """

    tasks: Sequence[str]
    limit: float | None
    num_fewshot: int | None
    batch_size: int
    seed: int
    include_path: Sequence[str]

    def __post_init__(self) -> None:
        tasks = (self.tasks,) if isinstance(self.tasks, str) else tuple(self.tasks or ())
        folders = (self.include_path,) if isinstance(self.include_path, str) else tuple(self.include_path or ())
        if not tasks:
            raise ConfigError("tasks is empty; name at least one, or leave the accuracy evaluator out.")
        check_at_least(1, batch_size=self.batch_size)
        check_at_least(0, num_fewshot=self.num_fewshot)
        check_seed(self.seed)
        if self.limit is not None and self.limit <= 0:
            raise ConfigError(f"limit must be positive, or null to take all items, got {self.limit}.")
        for folder in folders:
            if not Path(folder).is_dir():
                raise ConfigError(f"include_path must name folders with task YAML files; {folder} is none.")
        object.__setattr__(self, "tasks", tasks)
        object.__setattr__(self, "include_path", folders)

    def content(self) -> Mapping[str, str]:
        """By task a hash of all its items, and by folder or file of tasks of others one of the files there."""
        with _quiet(), _seeded(self.seed):
            tasks, _ = self._load_tasks()
            found = {f"task {name}": _items_hash(task) for name, task in tasks.items()}
        named = [Path(name).resolve().parent for name in self.tasks if Path(name).is_file()]
        for folder in (*map(Path, self.include_path), *named):
            found[f"files {folder}"] = _files_hash(folder)
        return found

    def check(self, model: LoadedModel) -> None:
        """ConfigError if a task is unknown, or the model generates no text. The data is read later, by `evaluate`."""
        check_task(model, "Accuracy on lm-eval's tasks", Task.CAUSAL_LM, Task.SEQ2SEQ_LM)
        with _quiet():
            for name in self.tasks:
                self._manager(name)

    def evaluate(self, model: LoadedModel) -> Mapping[str, float | str]:
        """`acc/TASK`, `acc_norm/TASK`, their `acc_stderr/TASK`, and all other metrics of the tasks, as `METRIC/TASK`.

        `acc/mean` and `acc_norm/mean` are over the requested tasks. Also `items/TASK`, `task_version/TASK` and
        `lm_eval/version`. Raises DataError if a task's data cannot be read.
        """
        with _quiet(), _seeded(self.seed):
            tasks, groups = self._load_tasks()
            harness = SharedHarness(
                pretrained=model.module,
                # A copy: the harness gives the tokenizer a padding token.
                tokenizer=copy.deepcopy(model.tokenizer),
                batch_size=self.batch_size,
                softmax_dtype=torch.float32,
            )
            # Not simple_evaluate: it also calls git, pip and the hub for an environment report that the record has.
            results = evaluate(
                lm=harness, task_dict={"tasks": tasks, "groups": groups}, limit=self.limit, log_samples=False
            )
        return _metrics(results)

    def _load_tasks(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The requested tasks and groups by name, with their data loaded and their number of examples set."""
        tasks: dict[str, Any] = {}
        groups: dict[str, Any] = {}
        for name in self.tasks:
            loaded = _load(name, self._manager(name))
            tasks |= loaded["tasks"]
            groups |= loaded.get("groups", {})
        for task in tasks.values():
            self._set_fewshot(task)
        return tasks, groups

    def _manager(self, name: str) -> TaskManager:
        """The task index that holds `name`, a task, group, tag or file; ConfigError if there is none."""
        folders = (str(OWN_TASKS), *self.include_path)
        # Indexing the harness' 14,000 tasks takes ten seconds, which is wasted if all tasks are own ones.
        own = _task_manager(folders, include_defaults=False)
        manager = own if name in own.all_subtasks else _task_manager(folders, include_defaults=True)
        if name not in manager.all_tasks and not Path(name).is_file():
            raise ConfigError(_unknown(name, manager))
        return manager

    def _set_fewshot(self, task: Any) -> None:
        """Sets the number of examples as lm-eval's command line does: a task that says 0 stays without examples."""
        own = task.get_config("num_fewshot")
        if own is None or (self.num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=self.num_fewshot or 0)
        task.set_fewshot_seed(seed=self.seed)


@cache
def _task_manager(folders: tuple[str, ...], *, include_defaults: bool) -> TaskManager:
    return TaskManager(include_path=list(folders), include_defaults=include_defaults)


def _load(name: str, manager: TaskManager) -> Mapping[str, Any]:
    """The `tasks` and `groups` that a name stands for, with their data; DataError if that cannot be read."""
    try:
        found: Mapping[str, Any] = manager.load([name])
    except ConnectionError as error:
        raise DataError(
            f"The data of task {name} cannot be reached: {error}. Without network, use docs_cloze (embedded), or tasks "
            "whose data is already in the Hugging Face cache (HF_HOME; HF_HUB_OFFLINE=1 makes it answer at once)."
        ) from error
    except (OSError, DatasetsError) as error:
        raise DataError(f"The data of task {name} cannot be read: {error} The embedded task is docs_cloze.") from error
    return found


def _items_hash(task: Any) -> str:
    """SHA-256 of every row of a task's data, of all splits, and of its settings as far as they are data."""
    digest = hashlib.sha256(json.dumps(task.dump_config(), sort_keys=True, default=str).encode())
    for split in sorted(task.dataset):
        digest.update(f"\n{split}\n".encode())
        for row in task.dataset[split]:
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def _files_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        digest.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _unknown(name: str, manager: TaskManager) -> str:
    near = difflib.get_close_matches(name, manager.all_tasks, n=5)
    hint = f"did you mean {', '.join(near)}?" if near else "lm_eval ls tasks lists them."
    return f"tasks: {name!r} is none of the {len(manager.all_tasks):,} tasks, groups and tags known to lm-eval; {hint}"


def _metrics(results: Mapping[str, Any]) -> dict[str, float | str]:
    """The harness' `metric,filter` of each task as `metric/TASK`, with the filter appended where a task has several."""
    metrics: dict[str, float | str] = {names.LM_EVAL_VERSION: metadata.version("lm_eval")}
    for task, measured in results["results"].items():
        for key, value in measured.items():
            metric, _, filter_name = key.partition(",")
            # "N/A" stands where a standard error is not defined.
            if filter_name and isinstance(value, int | float):
                metrics[f"{metric}/{task}" if filter_name == "none" else f"{metric}/{task}/{filter_name}"] = value
    for task, samples in results["n-samples"].items():
        metrics[names.metric(names.ITEMS, task)] = samples["effective"]
    for task, version in results["versions"].items():
        if version is not None:
            metrics[names.metric(names.TASK_VERSION, task)] = str(version)
    for metric in names.ACCURACIES:
        scored = list(_scored(metric, metrics, results))
        if scored:
            metrics[names.metric(metric, names.MEAN)] = sum(scored) / len(scored)
    return metrics


def _scored(metric: str, metrics: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[float]:
    """The scores behind the mean: one per requested task; a group's own score if it has one, else its tasks' scores."""
    subtasks = results["group_subtasks"]

    def scores(name: str) -> Iterator[float]:
        if f"{metric}/{name}" in metrics:
            yield metrics[f"{metric}/{name}"]
        else:
            for subtask in subtasks.get(name, ()):
                yield from scores(subtask)

    children = {child for group in subtasks.values() for child in group}
    for name in {**results["results"], **subtasks}:
        if name not in children:
            yield from scores(name)


class _WithoutBars(io.TextIOBase):
    """A stream that passes on everything but progress bars, which tqdm redraws with a carriage return."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if text.strip() and "\r" not in text and "\x1b[A" not in text:
            self._stream.write(text if text.endswith("\n") else f"{text}\n")
        return len(text)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lets through the harness' errors only, and its progress bars on terminals only (it has no switch for them)."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    stderr = sys.stderr if sys.stderr.isatty() else _WithoutBars(sys.stderr)
    try:
        with contextlib.redirect_stderr(stderr):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators, which some tasks draw from, and restores their states afterwards."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
