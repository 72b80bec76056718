"""Scores on tasks of MTEB, the benchmark of text embeddings, measured on the model in memory."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError

from bs_exp.corpora.windows import check_length
from bs_exp.errors import ConfigError, DataError
from bs_exp.models.model_inputs import check_task
from bs_exp.records import metrics as names
from bs_exp.types import LoadedModel, Task
from bs_exp.validation import check_at_least, shown

# What stands in a metric's name where others have that of a task.
_TAKEN = (names.MEAN, "version")


@dataclass(frozen=True, kw_only=True)
class MtebScores:
    """The main score of tasks of MTEB, by the `mteb` package, and of pairs of sentences of one's own.

    Of its tasks of semantic textual similarity (STS) that is Spearman's correlation between the cosine of two
    sentences' embeddings and people's judgement. `pairs` names files with such pairs, read as tasks: .jsonl, .csv or
    .tsv with `sentence1`, `sentence2` and `score`. Embeddings are those of `Embeddings`: pooled as a
    sentence-transformers model says, else the mean over tokens; texts are cut at `sequence_length` tokens. No prompts
    stand before the texts. MTEB: Muennighoff et al. (2210.07316).
    """

    tasks: Sequence[str]
    pairs: Mapping[str, str]
    languages: Sequence[str] | None
    sequence_length: int
    batch_size: int

    def __post_init__(self) -> None:
        for setting in ("tasks", "languages"):
            given = getattr(self, setting)
            given = (given,) if isinstance(given, str) else tuple(given or ())
            if not all(isinstance(name, str) for name in given):
                raise ConfigError(f"{setting} must be a list of names, got {shown(given)}.")
            object.__setattr__(self, setting, given)
        tasks = self.tasks
        if not tasks and not self.pairs:
            raise ConfigError(
                "tasks and pairs are both empty; name a task of MTEB, or a file with pairs of sentences, or leave the "
                "evaluator out."
            )
        if both := sorted(set(tasks) & set(self.pairs)):
            raise ConfigError(f"pairs must have other names than tasks, got {', '.join(both)} in both.")
        for name, file in self.pairs.items():
            if not isinstance(name, str) or name in _TAKEN:
                raise ConfigError(f"pairs must have names other than {' and '.join(_TAKEN)}, got {shown(name)}.")
            if not Path(file).is_file():
                raise ConfigError(f"pairs.{name} must name a file, and there is none at {file}.")
        check_at_least(2, sequence_length=self.sequence_length)
        check_at_least(1, batch_size=self.batch_size)

    def content(self) -> Mapping[str, str]:
        """By task the revision of its data, and by file of pairs a hash."""
        found = {f"task {task.metadata.name}": _revision(task) for task in self._named()}
        for name, file in self.pairs.items():
            found[f"pairs {name}"] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        return found

    def check(self, model: LoadedModel) -> None:
        """ConfigError without the package `mteb`, for tasks that it does not know, or a model without embeddings of
        texts or with too few positions. The tasks' data is read later, by `evaluate`."""
        check_task(model, "A score on MTEB", Task.ENCODER, Task.MASKED_LM, Task.CAUSAL_LM)
        check_length(self.sequence_length, model)
        self._named()

    def evaluate(self, model: LoadedModel) -> Mapping[str, float | str]:
        """`mteb_score/TASK`, and `mteb_score/mean` of all; also `mteb/version`, and `mteb/TASK`, the data's revision.

        Embeddings that are not finite count as zero; `mteb_score_nonfinite/TASK` says of how many texts. DataError if a
        task's data cannot be read.
        """
        tasks = self._named()
        # Its import takes seconds.
        from bs_exp.evaluation.mteb_encoder import own_pairs, scored

        own = [own_pairs(name, Path(file)) for name, file in self.pairs.items()]
        found: dict[str, float | str] = {names.metric(names.MTEB, "version"): metadata.version("mteb")}
        scores: dict[str, float] = {}
        for task in [*tasks, *own]:
            name = task.metadata.name
            try:
                score = scored(task, model, length=self.sequence_length, batch_size=self.batch_size)
            except (OSError, DatasetsError) as error:
                raise DataError(
                    f"The data of MTEB's task {name} cannot be read: {error} Without network, use tasks whose data is "
                    "already in the Hugging Face cache (HF_HOME; HF_HUB_OFFLINE=1 makes it answer at once), or pairs "
                    "of your own (evaluation.pairs)."
                ) from error
            found[names.metric(names.MTEB_SCORE, name)] = scores[name] = score.value
            if score.nonfinite:
                found[names.metric(names.MTEB_SCORE, name, names.NONFINITE)] = score.nonfinite
            found[names.metric(names.MTEB, name)] = _revision(task)
        found[names.metric(names.MTEB_SCORE, names.MEAN)] = sum(scores.values()) / len(scores)
        return found

    def _named(self) -> list[Any]:
        """The tasks of MTEB, without their data; ConfigError for a name that is none."""
        if importlib.util.find_spec("mteb") is None:
            raise ConfigError(
                "Scores on MTEB need the package mteb, which is not installed: pip install 'bs-exp[mteb]' (in a "
                "checkout: pip install '.[mteb]'). evaluation=embeddings needs none."
            )
        if not self.tasks:
            return []
        import mteb

        try:
            found = [mteb.get_task(name, languages=list(self.languages or ()) or None) for name in self.tasks]
        except ValueError as error:
            raise ConfigError(
                f"languages must be codes of three letters that each of the tasks {', '.join(self.tasks)} has, got "
                f"{shown(self.languages)}: {error} null takes all."
            ) from error
        except KeyError as error:
            known = [task.metadata.name for task in mteb.get_tasks()]
            unknown = [name for name in self.tasks if name not in known]
            near = difflib.get_close_matches((unknown or list(self.tasks))[0], known, n=5)
            hint = f"did you mean {', '.join(near)}?" if near else "mteb available-tasks lists them."
            raise ConfigError(
                f"tasks: {', '.join(map(repr, unknown or self.tasks))} is none of the {len(known):,} tasks known to "
                f"mteb {metadata.version('mteb')}; {hint}"
            ) from error
        for task in found:
            if parts := getattr(task.metadata, "tasks", None):
                named = ", ".join(part.metadata.name for part in parts)
                raise ConfigError(f"tasks: {task.metadata.name} is made of others; name them: {named}.")
            if list(task.metadata.modalities) != ["text"]:
                kinds = ", ".join(task.metadata.modalities)
                raise ConfigError(f"tasks: {task.metadata.name} is on {kinds}; only tasks on text can be scored here.")
        return found


def _revision(task: Any) -> str:
    """Which data a task reads: `REPOSITORY@COMMIT`, or of own pairs the file's name and hash."""
    data: Mapping[str, str] = task.metadata.dataset
    return f"{data['path']}@{data['revision']}"
