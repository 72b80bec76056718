"""Names of metrics: what runs write, what records hold, which of them rank results, and which way is better.

A metric is called `KIND/NAME`, such as `ppl/wikitext2` or `throughput/decode_tok_s`. A suffix of the kind says more
about another metric: `ppl_tokens/wikitext2`, `acc_stderr/piqa`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

# Perplexity of the next token, of masked tokens, and of what a decoder writes.
PPL, MASKED_PPL, SEQ2SEQ_PPL = "ppl", "masked_ppl", "seq2seq_ppl"
PERPLEXITIES = (PPL, MASKED_PPL, SEQ2SEQ_PPL)
# Hidden states beside the dense model's.
COSINE, RELATIVE_ERROR, SIMILARITY = "cosine", "relative_error", "similarity"
# Embeddings of texts beside the dense model's: their cosine, the rank correlation of the cosines of all pairs, and the
# share of the ten nearest texts that are the same; `embedding_texts/NAME` says of how many.
EMBEDDING, EMBEDDING_COSINE, EMBEDDING_SPEARMAN = "embedding", "embedding_cosine", "embedding_spearman"
EMBEDDING_OVERLAP, EMBEDDING_TEXTS = "embedding_overlap10", "embedding_texts"
# The main score of a task of MTEB; `mteb/version` and `mteb/TASK` say of which data.
MTEB, MTEB_SCORE = "mteb", "mteb_score"
# A compressed model as draft of its dense one: the share of its tokens that are accepted, tokens per pass of the dense
# model, the share of prompts with the dense model's very text, the speed-up that reading the weights allows, and the
# one that was measured. `draft/NAME` and `draft_tokens/NAME` say how.
DRAFT, DRAFT_ACCEPTANCE, DRAFT_PER_PASS = "draft", "draft_acceptance", "draft_tokens_per_pass"
DRAFT_SAME_TEXT, DRAFT_BOUND, DRAFT_SPEEDUP = "draft_same_text", "draft_speedup_bound", "draft_speedup"
ACC, ACC_NORM = "acc", "acc_norm"
ACCURACIES = (ACC, ACC_NORM)
ITEMS, TASK_VERSION, LM_EVAL = "items", "task_version", "lm_eval"
THROUGHPUT, COST, SIZE = "throughput", "cost", "size"

TOKENS, TEXT_SHA256, NONFINITE, STANDARD_ERROR = "_tokens", "_text_sha256", "_nonfinite", "_stderr"
RATIO = "_ratio"  # to the dense model's
MEAN = "mean"

PREFILL, DECODE = "throughput/prefill_tok_s", "throughput/decode_tok_s"
SLOWEST, FASTEST = "_min", "_max"  # after the two names above
# After them too, of a compressed model that was timed in turns with its dense one: how many times as fast it was (the
# median over rounds, and the 95 % interval of that), how much the machine's own speed changed meanwhile, and in words
# whether that is a difference.
SPEEDUP, SPEEDUP_LOW, SPEEDUP_HIGH = "_speedup", "_speedup_low", "_speedup_high"
DRIFT, DIFFERENCE = "_drift", "_difference"
FASTER, SLOWER, NO_DIFFERENCE = "faster", "slower", "no difference measured"
# How dense and compressed model were timed: in one stage round by round, or apart, which compares nothing.
TIMED, IN_TURNS, APART = "throughput/timed", "in turns", "apart: no memory for both"
PEAK_MEMORY = "throughput/peak_memory_bytes"
LM_EVAL_VERSION = "lm_eval/version"
COMPRESSION_SECONDS = "cost/compression_s"
# Rate -> the tokens after which a compression has paid for itself.
BREAK_EVEN = {PREFILL: "cost/break_even_prefill_tokens", DECODE: "cost/break_even_decode_tokens"}
# Entries of a record's `size` that describe the compressed model, and so can be objectives: `size/bytes`.
SIZES = ("retain_ratio", "model_retain_ratio", "targeted_parameters", "parameters", "bytes", "targeted_bytes")

# Settings, counts and speeds, which say nothing of the quality of a model.
_NO_QUALITY = (ITEMS, TASK_VERSION, LM_EVAL, MTEB, THROUGHPUT, COST, DRAFT, DRAFT_BOUND, EMBEDDING_TEXTS)
_NO_QUALITY_ENDS = (TOKENS, NONFINITE, "_sha256", STANDARD_ERROR, SPEEDUP, SPEEDUP_LOW, SPEEDUP_HIGH, DRIFT)
# Beginnings of the kinds, beside perplexities, of which less is better; most are names of lm-eval's.
_LOWER_IS_BETTER = (
    "word_perplexity",
    "byte_perplexity",
    "bits_per_byte",
    "perplexity",
    "loss",
    "kl",
    "brier",
    RELATIVE_ERROR,
)
_TITLES = {
    PPL: "perplexity",
    MASKED_PPL: "masked perplexity",
    SEQ2SEQ_PPL: "sequence-to-sequence perplexity",
    EMBEDDING_COSINE: "cosine of embeddings",
    EMBEDDING_SPEARMAN: "rank correlation of similarities",
    EMBEDDING_OVERLAP: "shared ten nearest texts",
    MTEB_SCORE: "score on MTEB",
    DRAFT_ACCEPTANCE: "accepted share of drafted tokens",
    DRAFT_PER_PASS: "tokens per pass of the dense model",
    DRAFT_SAME_TEXT: "share of prompts with the dense model's text",
    ACC: "accuracy",
    ACC_NORM: "normalised accuracy",
}


def metric(kind: str, name: str, suffix: str = "") -> str:
    """The full name: `metric(PPL, "text", TOKENS)` is `ppl_tokens/text`."""
    return f"{kind}{suffix}/{name}"


def kind_of(name: str) -> str:
    """What stands before the first slash: `ppl`, `acc`, ..."""
    return name.partition("/")[0]


def is_perplexity(name: str) -> bool:
    """Whether it is a perplexity of any kind of model."""
    return kind_of(name) in PERPLEXITIES


def is_accuracy(name: str) -> bool:
    """Whether it is a share of items answered rightly."""
    return kind_of(name) in ACCURACIES


def is_text_hash(name: str) -> bool:
    """Whether it identifies the text that was read."""
    return kind_of(name).endswith(TEXT_SHA256)


def is_nonfinite(name: str) -> bool:
    """Whether it counts what could not be evaluated: losses that are not finite."""
    return kind_of(name).endswith(NONFINITE)


def is_setting(name: str) -> bool:
    """Whether it says how something was measured: hashes and sizes of texts, versions, counts, lengths, devices."""
    kind = kind_of(name)
    if kind == THROUGHPUT:
        return not name.startswith((PREFILL, DECODE, PEAK_MEMORY))
    settings = (ITEMS, TASK_VERSION, LM_EVAL, MTEB, DRAFT, EMBEDDING_TEXTS)
    return kind in settings or kind.endswith((TOKENS, TEXT_SHA256))


def dense_ratios(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """`ppl_ratio/TEXT`: every perplexity of the compressed model over the dense one's, from the metrics of a record."""
    dense, compressed = found.get("dense", {}), found.get("compressed", {})
    return {
        name.replace("/", f"{RATIO}/", 1): value / dense[name]
        for name, value in compressed.items()
        if is_perplexity(name) and isinstance(value, int | float) and dense.get(name)
    }


def is_standard_error(name: str) -> bool:
    """Whether it is the standard error of another metric."""
    return kind_of(name).endswith(STANDARD_ERROR)


def standard_error(metrics: Mapping[str, Any], name: str) -> Any:
    """The standard error of a metric among the metrics of a model, or None."""
    return metrics.get(name.replace("/", f"{STANDARD_ERROR}/", 1))


def lower_is_better(name: str) -> bool:
    """Which way results are ranked: True for perplexities, losses, errors and sizes; False for the rest."""
    return is_perplexity(name) or kind_of(name) == SIZE or kind_of(name).startswith(_LOWER_IS_BETTER)


def measured_speedup(compressed: Mapping[str, Any], rate: str) -> float | None:
    """How many times as fast as the dense model the compressed one reads (`PREFILL`) or writes (`DECODE`).

    None where no difference was measured: the two were not timed in turns, or too few times, or the interval of the
    speed-up holds 1, or the machine's own speed changed by more.
    """
    value = compressed.get(rate + SPEEDUP)
    if compressed.get(rate + DIFFERENCE) not in (FASTER, SLOWER) or not isinstance(value, int | float):
        return None
    return float(value)


def default_objective(names: Iterable[str]) -> str | None:
    """What results are ranked by where no objective is set, of the metrics of a model in their order.

    The first perplexity of any kind; without one (models without logits) the first mean cosine to the dense model's
    hidden states, or the first accepted share of drafted tokens; None without any.
    """
    names = list(names)
    others = (name for kind in (COSINE, DRAFT_ACCEPTANCE) for name in names if kind_of(name) == kind)
    candidates = (*filter(is_perplexity, names), *others)
    return next(iter(candidates), None)


def quality(metrics: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the numbers that say how good a model is, perplexities first, means last, each once."""
    names = dict.fromkeys(
        name
        for found in metrics
        for name, value in found.items()
        if isinstance(value, int | float)
        and kind_of(name) not in _NO_QUALITY
        and not kind_of(name).endswith(_NO_QUALITY_ENDS)
    )
    # The mean of one task is that task.
    sizes = Counter(kind_of(name) for name in names)
    return sorted(
        (name for name in names if not (_is_mean(name) and sizes[kind_of(name)] == 2)),
        key=lambda name: (not is_perplexity(name), _is_mean(name)),
    )


def headlines(names: Iterable[str], main: str | None) -> list[str]:
    """What gets a table and a curve of its own: perplexities, the mean accuracy (or the only one), and `main`."""
    names = list(names)
    accuracies, mean = [name for name in names if kind_of(name) == ACC], metric(ACC, MEAN)
    only = mean if mean in accuracies else accuracies[0] if len(accuracies) == 1 else None
    return [name for name in names if is_perplexity(name) or name in (only, main)]


def title(name: str) -> str:
    """The name in words: `ppl/wikitext2` is `perplexity on wikitext2`."""
    kind, _, rest = name.partition("/")
    kind = _TITLES.get(kind, kind.replace("_", " "))
    if rest == MEAN:
        return f"mean {kind}"
    return f"{kind} on {rest}" if rest else kind


def short_title(name: str) -> str:
    """The name as the heading of a narrow column."""
    kind, _, rest = name.partition("/")
    return {PPL: f"{PPL} {rest}", ACC: rest, ACC_NORM: f"{rest} (norm)"}.get(kind, name)


def _is_mean(name: str) -> bool:
    return name.endswith(f"/{MEAN}")
