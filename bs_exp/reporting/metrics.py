"""Which numbers of a record are results, what they are called, and which way is better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from bs_exp.reporting import formats

PREFILL, DECODE = "throughput/prefill_tok_s", "throughput/decode_tok_s"
MEAN = "acc/mean"
_PERPLEXITY = "ppl"  # also of masked and of sequence-to-sequence models
_MEAN = "/mean"
_STANDARD_ERROR = "_stderr"
# What metrics of these families say are settings, counts and speeds, not the quality of a model.
_NO_QUALITY = ("items", "task_version", "lm_eval", "throughput", "cost")
_NO_QUALITY_ENDS = ("_tokens", "_nonfinite", "_sha256", "_stderr")
_LOWER_IS_BETTER = (
    "word_perplexity",
    "byte_perplexity",
    "bits_per_byte",
    "perplexity",
    "loss",
    "kl",
    "brier",
    "relative_error",
)


def family(name: str) -> str:
    """What stands before the slash: `ppl`, `acc`, ..."""
    return name.partition("/")[0]


def is_perplexity(name: str) -> bool:
    return family(name).endswith(_PERPLEXITY)


def lower_is_better(name: str) -> bool:
    return is_perplexity(name) or family(name).startswith(_LOWER_IS_BETTER)


def quality(metrics: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the numbers that say how good a model is, perplexities first, means last, each once."""
    names = dict.fromkeys(
        name
        for found in metrics
        for name, value in found.items()
        if isinstance(value, int | float)
        and family(name) not in _NO_QUALITY
        and not family(name).endswith(_NO_QUALITY_ENDS)
    )
    # The mean of one task is that task.
    sizes = Counter(family(name) for name in names)
    return sorted(
        (name for name in names if not (name.endswith(_MEAN) and sizes[family(name)] == 2)),
        key=lambda name: (not is_perplexity(name), name.endswith(_MEAN)),
    )


def headlines(names: Iterable[str], main: str | None) -> list[str]:
    """What gets a table and a curve of its own: perplexities, the mean accuracy (or the only one), and `main`."""
    names = list(names)
    accuracies = [name for name in names if family(name) == family(MEAN)]
    only = MEAN if MEAN in accuracies else accuracies[0] if len(accuracies) == 1 else None
    return [name for name in names if is_perplexity(name) or name in (only, main)]


def standard_error(metrics: Mapping[str, Any], name: str) -> Any:
    """The standard error that the harness gave with a metric, or None."""
    return metrics.get(name.replace("/", f"{_STANDARD_ERROR}/", 1))


def show(name: str, value: Any) -> str:
    """A metric as it is printed."""
    if is_perplexity(name):
        return formats.perplexity(value)
    if family(name) in ("acc", "acc_norm") and formats.is_number(value):
        return f"{value:.3f}"
    return formats.number(value)


def title(name: str) -> str:
    """The name for a reader: `ppl/wikitext2` is `perplexity on wikitext2`."""
    words = {
        "ppl": "perplexity",
        "masked_ppl": "masked perplexity",
        "seq2seq_ppl": "sequence-to-sequence perplexity",
        "acc": "accuracy",
        "acc_norm": "normalised accuracy",
    }
    kind, _, rest = name.partition("/")
    kind = words.get(kind, kind.replace("_", " "))
    if rest == "mean":
        return f"mean {kind}"
    return f"{kind} on {rest}" if rest else kind
