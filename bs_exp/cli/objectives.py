"""Names of objectives against what the evaluators of a configuration will report, before any of them runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig

from bs_exp.errors import ConfigError
from bs_exp.records import metrics as names

_EVALUATION = "bs_exp.evaluation."
# Evaluator -> the kinds of metrics that it reports on each of its texts.
_ON_TEXTS: Mapping[str, tuple[str, ...]] = {
    "Perplexity": (names.PPL,),
    "MaskedPerplexity": (names.MASKED_PPL,),
    "Seq2SeqPerplexity": (names.SEQ2SEQ_PPL,),
    "Similarity": (names.COSINE, names.RELATIVE_ERROR),
    "Embeddings": (names.EMBEDDING_COSINE, names.EMBEDDING_SPEARMAN, names.EMBEDDING_OVERLAP),
    "Draft": (names.DRAFT_ACCEPTANCE, names.DRAFT_PER_PASS, names.DRAFT_SAME_TEXT, names.DRAFT_BOUND),
}
_OWN_TASK = "docs_cloze"


def check_reported(objective: str | Sequence[str] | None, evaluators: Mapping[str, Any]) -> None:
    """ConfigError for an objective that none of the evaluators (nodes of the configuration) can report.

    Evaluators of others, and tasks of lm-eval, may report anything: what is theirs is looked for when they have run.
    """
    asked = () if objective is None else (objective,) if isinstance(objective, str) else tuple(objective)
    known = [*(name for node in evaluators.values() for name in _reported(node)), *_sizes()]
    open_ended = any(_is_open(node) for node in evaluators.values())
    for name in asked:
        kind = names.kind_of(name)
        closed = kind in (names.SIZE, names.THROUGHPUT, *(k for kinds in _ON_TEXTS.values() for k in kinds))
        if not (_matches(name, known) or (open_ended and not closed)):
            raise ConfigError(f"objective must be one of {', '.join(known)}, or a list of these, got {name!r}.")


def _matches(name: str, known: Sequence[str]) -> bool:
    if name in known:
        return True
    # Beside a rate stand its slowest and fastest round; beside a metric its tokens and standard error.
    kind, _, rest = name.partition("/")
    base = kind.removesuffix(names.STANDARD_ERROR).removesuffix(names.TOKENS)
    return f"{base}/{rest}" in known or any(name.startswith(f"{rate}_") for rate in (names.PREFILL, names.DECODE))


def _reported(node: Any) -> Iterator[str]:
    name = _class(node)
    for kind in _ON_TEXTS.get(name or "", ()):
        corpora = node.get("corpora")
        for text in corpora if isinstance(corpora, DictConfig | ListConfig) else ():
            yield names.metric(kind, str(text))
    if name == "Accuracy":
        for kind in names.ACCURACIES:
            yield from (names.metric(kind, task) for task in [*_tasks(node), names.MEAN])
    if name == "MtebScores":
        yield from (
            names.metric(names.MTEB_SCORE, task) for task in [*_tasks(node), *_names(node, "pairs"), names.MEAN]
        )
    if name == "Throughput":
        yield from (names.PREFILL, names.DECODE, names.PEAK_MEMORY)


def _is_open(node: Any) -> bool:
    """Whether an evaluator may report more than is known here."""
    name = _class(node)
    if name == "Accuracy":
        return any(task != _OWN_TASK for task in _tasks(node))
    return name not in (*_ON_TEXTS, "MtebScores", "Throughput")


def _class(node: Any) -> str | None:
    """The name of the class of an evaluator of ours; None for others."""
    target = str(node.get("_target_")) if isinstance(node, DictConfig) else ""
    return target.rpartition(".")[2] if target.startswith(_EVALUATION) else None


def _tasks(node: DictConfig) -> list[str]:
    return _names(node, "tasks")


def _names(node: DictConfig, setting: str) -> list[str]:
    named = node.get(setting)
    return [str(name) for name in named] if isinstance(named, DictConfig | ListConfig) else []


def _sizes() -> list[str]:
    return [names.metric(names.SIZE, name) for name in names.SIZES]
