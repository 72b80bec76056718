"""Windows that an evaluator reads, taken from where they were cut before, by another process too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from bs_exp.cache import Cache
from bs_exp.protocols import ReadsWindows
from bs_exp.runs.content_keys import evaluated_windows_key, tokenizer_hash
from bs_exp.runs.dense_cache import DenseStore
from bs_exp.types import TokenWindows


@dataclass(frozen=True, eq=False)
class WindowsAtHand:
    """The windows of an evaluator by name, and those of them that were cut just now, by their keys."""

    windows: Mapping[str, TokenWindows]
    cut: Mapping[str, TokenWindows]

    def keep(self, store: DenseStore, cache: Cache) -> None:
        """Keeps what was cut; to be called only if the texts did not change while they were read."""
        for key, windows in self.cut.items():
            store.keep_evaluated_windows(key, windows, cache)


def windows_at_hand(
    evaluator: ReadsWindows,
    content: Mapping[str, str] | None,
    tokenizer: PreTrainedTokenizerBase,
    store: DenseStore,
    cache: Cache,
) -> WindowsAtHand:
    """Cuts what is not kept under the hash of its text in `content`; everything, and for nobody else, if that is None.

    Raises DataError if a text cannot be read, or is too short.
    """
    windows: dict[str, TokenWindows] = {}
    cut: dict[str, TokenWindows] = {}
    tokens = tokenizer_hash(tokenizer) if content else ""
    for name, text in evaluator.texts().items():
        key = None if content is None or name not in content else evaluated_windows_key(text, content[name], tokens)
        found = None if key is None else store.evaluated_windows(key, cache)
        if found is None:
            found = text.windows(tokenizer)
            if key is not None:
                cut[key] = found
        windows[name] = found
    return WindowsAtHand(windows, cut)
