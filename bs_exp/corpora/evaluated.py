"""The windows of a text that are evaluated."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from bs_exp.corpora.sampling import evenly_spaced
from bs_exp.corpora.windows import SpecialTokens, Tail, cut_windows, part_of
from bs_exp.protocols import Corpus
from bs_exp.types import TokenWindows


@dataclass(frozen=True, kw_only=True)
class EvaluatedWindows:
    """A text cut whole: windows of `sequence_length` tokens every `stride` (None: one after the other).

    `max_windows` takes that many, evenly spaced over the text, and then no tail; None takes all. The other settings are
    those of `cut_windows`. How a model is fed, and how many windows at once, makes no other windows.
    """

    corpus: Corpus
    sequence_length: int
    max_windows: int | None
    special_tokens: SpecialTokens
    stride: int | None = None
    tail: Tail = "drop"

    def windows(self, tokenizer: PreTrainedTokenizerBase) -> TokenWindows:
        """The windows, with the provenance of their text as `corpus`; the same for the same settings and text.

        Raises DataError if the text cannot be read, or is too short for one window.
        """
        text, corpus = self.corpus.read()
        windows = cut_windows(
            text,
            tokenizer,
            sequence_length=self.sequence_length,
            special_tokens=self.special_tokens,
            tail=self.tail,
            stride=self.stride,
        )
        if self.max_windows is not None and self.max_windows < len(windows.ids):
            windows = part_of(windows, evenly_spaced(len(windows.ids), self.max_windows), name="evenly spaced")
        return replace(windows, provenance={"corpus": dict(corpus), **windows.provenance})


def text_hash(windows: TokenWindows) -> str:
    """SHA-256 of the whole text that the windows were cut from."""
    return str(windows.provenance["corpus"]["fingerprint"])
