"""Text to token windows, by one rule for calibration and evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bs_exp.corpora.content import content_of
from bs_exp.errors import ConfigError, DataError
from bs_exp.models.model_inputs import check_feeding, feeder
from bs_exp.protocols import Corpus
from bs_exp.types import Activations, Feeding, LoadedModel, Target, TokenWindows
from bs_exp.validation import check_at_least, check_choice, check_seed, shown

Order: TypeAlias = Literal["sequential", "random"]
Tail: TypeAlias = Literal["drop", "keep"]
SpecialTokens: TypeAlias = bool | Literal["per_window"]
"""Whether the tokenizer adds its special tokens: never, once around the whole text, or around every window."""
PER_WINDOW = "per_window"


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, *, special_tokens: bool) -> Int[Tensor, " tokens"]:
    """Token ids (int64) of the whole text; `special_tokens` adds what the tokenizer puts around a text (Llama: BOS)."""
    # verbose=False: a corpus is meant to be longer than the model's context, so the tokenizer's warning is noise.
    ids = tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def check_special_tokens(value: object) -> None:
    """ConfigError unless the value is one of `SpecialTokens`."""
    if not isinstance(value, bool) and value != PER_WINDOW:
        raise ConfigError(
            f"special_tokens must be true (once around the whole text), false or {PER_WINDOW}, got {shown(value)}."
        )


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The token ids that a tokenizer puts before a text and behind it; both are empty for many tokenizers."""
    text = "text"
    plain, whole = (tokenize(text, tokenizer, special_tokens=added).tolist() for added in (False, True))
    starts = (i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain)
    start = next(starts, None)
    if start is None:
        raise DataError(
            f"{type(tokenizer).__name__} changes a text's own tokens when it adds special ones, so these cannot be put "
            "around windows. Use special_tokens=true or false."
        )
    return whole[:start], whole[start + len(plain) :]


def cut_windows(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    num_sequences: int | None = None,
    order: Order = "sequential",
    seed: int = 0,
    special_tokens: SpecialTokens = False,
    tail: Tail = "drop",
    stride: int | None = None,
) -> TokenWindows:
    """Windows of `sequence_length` tokens that start every `stride` tokens (default: `sequence_length`).

    `num_sequences` takes so many windows, None all: the first ones, or with `order="random"` the first ones of a
    permutation drawn from `seed`. With `tail="keep"` the tokens after the last window are kept as a shorter one, but
    only if no window is left out. With `special_tokens="per_window"` a window has room for the special tokens: it holds
    so many fewer of the text, and the default stride is what it holds. Raises DataError if the text has too few tokens.
    """
    ids = tokenize(text, tokenizer, special_tokens=special_tokens is True)
    before, after = special_tokens_around(tokenizer) if special_tokens == PER_WINDOW else ([], [])
    length = sequence_length - len(before) - len(after)
    if length < 1:
        raise DataError(
            f"sequence_length must be above {len(before) + len(after)}, the number of special tokens that the "
            f"tokenizer puts around every window, got {sequence_length}."
        )
    if len(ids) < length:
        raise DataError(
            f"The text is too short for one window: {len(ids):,} tokens found, {length:,} needed. "
            "Use a longer text or a smaller sequence_length."
        )
    stride = stride or length
    if special_tokens == PER_WINDOW and stride > length:
        raise ConfigError(
            f"stride must be at most {length}, the tokens of the text in a window of {sequence_length} with the "
            f"tokenizer's special tokens around it, got {stride}: tokens between the windows would be skipped."
        )
    windows = ids.unfold(0, length, stride)
    if num_sequences is not None and num_sequences > len(windows):
        raise DataError(
            f"{num_sequences:,} windows of {length:,} tokens need {num_sequences * stride:,} tokens, but the "
            f"text has {len(ids):,}, enough for {len(windows):,}. Use a longer text, a smaller sequence_length, "
            f"or num_sequences of at most {len(windows)} (calibration also takes num_sequences=all)."
        )
    chosen = windows[_positions(len(windows), num_sequences, order, seed)]
    rest = ids[len(windows) * stride :]
    has_new_tokens = len(ids) > (len(windows) - 1) * stride + length
    # A tail follows the last window of the text, so it is dropped where windows are left out.
    kept_tail = rest if tail == "keep" and has_new_tokens and num_sequences is None else None
    around: dict[str, Any] = {}
    if special_tokens == PER_WINDOW:
        chosen = _surrounded(chosen, before, after)
        kept_tail = None if kept_tail is None else _surrounded(kept_tail[None], before, after)[0]
        around = {"special_ids": [before, after]}
    return TokenWindows(
        ids=chosen,
        tail=kept_tail,
        provenance={
            "tokens": len(ids),
            "available": len(windows),
            "windows": len(chosen),
            "sequence_length": sequence_length,
            "stride": stride,
            "order": order,
            "seed": seed if order == "random" else None,
            "special_tokens": special_tokens,
            **around,
            "tail": 0 if kept_tail is None else len(kept_tail),
            "sha256": _fingerprint(chosen, kept_tail),
        },
    )


def _surrounded(
    windows: Int[Tensor, "windows length"], before: Sequence[int], after: Sequence[int]
) -> Int[Tensor, "windows longer"]:
    """Every window with the same tokens before and behind it."""
    parts = [torch.tensor(ids, dtype=torch.long).expand(len(windows), -1) for ids in (before, after)]
    return torch.cat([parts[0], windows, parts[1]], dim=1)


def _positions(available: int, wanted: int | None, order: Order, seed: int) -> Int[Tensor, " chosen"]:
    if order == "sequential":
        return torch.arange(available)[:wanted]
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:wanted]


def part_of(windows: TokenWindows, chosen: Int[Tensor, " part"], *, name: str) -> TokenWindows:
    """The windows at these positions, without a tail; `name` becomes the `part` in their provenance."""
    ids = windows.ids[chosen]
    provenance = {**windows.provenance, "part": name, "windows": len(ids), "tail": 0}
    provenance["sha256"] = _fingerprint(ids, None)
    return replace(windows, ids=ids, tail=None, provenance=provenance)


def _fingerprint(windows: Int[Tensor, "windows length"], tail: Int[Tensor, " rest"] | None) -> str:
    """SHA-256 of the shapes and ids of windows and tail."""
    digest = hashlib.sha256()
    for ids in (windows, torch.empty(0, dtype=torch.long) if tail is None else tail):
        digest.update(repr(tuple(ids.shape)).encode())
        digest.update(ids.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def max_positions(model: LoadedModel) -> int | None:
    """The longest sequence, in tokens, that the model has positions for; None if its configuration names no limit."""
    limit = getattr(model.module.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) - _first_position(model.module, int(limit)) if limit else None


def _first_position(module: nn.Module, limit: int) -> int:
    """Unused entries at the start of a learned position table: RoBERTa's first position is `padding_idx + 1`."""
    for name, table in module.named_modules():
        is_positions = name.endswith("position_embeddings") and isinstance(table, nn.Embedding)
        if is_positions and table.num_embeddings == limit and table.padding_idx is not None:
            return int(table.padding_idx) + 1
    return 0


def vocabulary_size(model: LoadedModel) -> int:
    """Number of token ids that the model embeds; with a padded embedding more than the tokenizer has."""
    return cast(nn.Embedding, model.module.get_input_embeddings()).num_embeddings


def check_length(length: int, model: LoadedModel, feeding: Feeding | None = None) -> None:
    """ConfigError if a window of `length` tokens takes more positions than the model has."""
    limit = max_positions(model)
    taken = feeder(model, feeding or Feeding()).positions(length)
    if limit is not None and taken > limit:
        parts = "" if taken == length else f" and takes {taken:,} positions"
        raise ConfigError(
            f"sequence_length is {length:,}{parts}, but the model has {limit:,} positions; set it to "
            f"{limit * length // taken} or less."
        )


def fitting_length(length: int, model: LoadedModel, feeding: Feeding | None = None) -> int:
    """`length`, or the tokens of the longest window that the model has positions for, if that is less."""
    limit = max_positions(model)
    taken = feeder(model, feeding or Feeding()).positions(length)
    return length if limit is None or taken <= limit else limit * length // taken


def check_fits(windows: TokenWindows, model: LoadedModel) -> None:
    """ConfigError if the windows are longer than the model's context, DataError if it has no embedding for a token."""
    check_length(windows.ids.shape[1], model, windows.feeding)
    parts = [windows.ids] if windows.tail is None else [windows.ids, windows.tail]
    largest = max(int(ids.max()) for ids in parts)
    vocabulary = vocabulary_size(model)
    if largest >= vocabulary:
        raise DataError(
            f"The tokenizer gives token id {largest:,}, but the model embeds ids below {vocabulary:,}: "
            "tokenizer and model do not belong together. Load both from the same place."
        )


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """The windows on which statistics are gathered: the corpus tokenised whole, cut from the start, remainder dropped.

    `num_sequences` windows (a number, or `all`) are the first ones (`sequential`) or drawn by `seed` (`random`).
    Basis Sharing, section 4.1: 256 sequences of 2048 tokens. `mask_share`, `source_share` and `target` say how models
    that do not predict the next token are fed (`Feeding`), `activations` where hidden states wait (`Waiting`).
    """

    corpus: Corpus
    num_sequences: int | Literal["all"]
    sequence_length: int
    order: Order
    batch_size: int
    seed: int
    special_tokens: SpecialTokens
    mask_share: float = Feeding.mask_share
    source_share: float = Feeding.source_share
    target: Target = Feeding.target
    activations: Activations = "auto"

    def __post_init__(self) -> None:
        check_choice("activations", self.activations, get_args(Activations))
        check_at_least(1, batch_size=self.batch_size, sequence_length=self.sequence_length)
        check_seed(self.seed)
        check_choice("order", self.order, get_args(Order))
        check_special_tokens(self.special_tokens)
        check_feeding(self.feeding)
        if self.num_sequences != "all":
            try:
                check_at_least(1, num_sequences=self.num_sequences)
            except ConfigError as error:
                raise ConfigError(f"{error} Or all, to take every window.") from error

    def windows(self, tokenizer: PreTrainedTokenizerBase) -> TokenWindows:
        """Windows of equal length, without a tail; the same for the same settings and text.

        Raises DataError if the text cannot be read, or is too short.
        """
        text, corpus = self.corpus.read()
        windows = cut_windows(
            text,
            tokenizer,
            sequence_length=self.sequence_length,
            num_sequences=None if self.num_sequences == "all" else self.num_sequences,
            order=self.order,
            seed=self.seed,
            special_tokens=self.special_tokens,
        )
        provenance: dict[str, Any] = {"corpus": dict(corpus), **windows.provenance}
        return TokenWindows(ids=windows.ids, provenance=provenance, feeding=self.feeding)

    def content(self) -> Mapping[str, str]:
        """A hash of the text."""
        return content_of({"corpus": self.corpus})

    @property
    def feeding(self) -> Feeding:
        """How the windows are given to a model that does not predict the next token."""
        return Feeding(mask_share=self.mask_share, source_share=self.source_share, target=self.target, seed=self.seed)
