"""Token windows of evaluation texts, for evaluators that feed a model as its task requires (`Feeding`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import track

from bs_exp.corpora.evaluated import EvaluatedWindows
from bs_exp.corpora.windows import check_length
from bs_exp.errors import ConfigError
from bs_exp.models.model_inputs import check_feeding
from bs_exp.protocols import Corpus, WindowSource
from bs_exp.types import Feeding, LoadedModel, TokenWindows
from bs_exp.validation import check_at_least

Item = TypeVar("Item")


class TextSettings(Protocol):
    """Settings of an evaluator that reads windows: adjacent ones, of which at most `max_windows`, evenly spaced."""

    @property
    def corpora(self) -> Mapping[str, Corpus]: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def max_windows(self) -> int | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def special_tokens(self) -> bool: ...
    @property
    def feeding(self) -> Feeding: ...


def check_text_settings(settings: TextSettings) -> None:
    """ConfigError for settings that give no windows, or cannot feed any model."""
    if not settings.corpora:
        raise ConfigError("corpora is empty; name at least one, or leave the evaluator out.")
    # Two tokens are the least of which one is predicted from another.
    check_at_least(2, sequence_length=settings.sequence_length)
    check_at_least(1, max_windows=settings.max_windows, batch_size=settings.batch_size)
    check_feeding(settings.feeding)
    if not isinstance(settings.special_tokens, bool):
        raise ConfigError(
            f"special_tokens must be true or false where tokens are masked, cut out or compared, got "
            f"{settings.special_tokens!r}; around every window they are put in calibration and for perplexity of the "
            "next token."
        )


def check_windows_fit(settings: TextSettings, model: LoadedModel) -> None:
    """ConfigError if windows would be too long for the model, or it cannot be fed as the settings say."""
    check_length(settings.sequence_length, model, settings.feeding)


def texts_of(settings: TextSettings) -> dict[str, EvaluatedWindows]:
    """What is cut for an evaluator of these settings: adjacent windows without a tail, by the name of the corpus."""
    return {
        name: EvaluatedWindows(
            corpus=corpus,
            sequence_length=settings.sequence_length,
            max_windows=settings.max_windows,
            special_tokens=settings.special_tokens,
        )
        for name, corpus in settings.corpora.items()
    }


def cut_now(texts: Mapping[str, WindowSource], model: LoadedModel) -> dict[str, TokenWindows]:
    """The windows of all texts for a model's tokenizer; DataError if a text cannot be read or is too short for one."""
    return {name: text.windows(model.tokenizer) for name, text in texts.items()}


def tracked(batches: Iterable[Item], label: str, *, total: int) -> Iterator[Item]:
    """The items of so many batches one by one, under a progress bar on stderr that is drawn on terminals only."""
    console = Console(stderr=True)
    yield from track(batches, label, total, console=console, transient=True, disable=not console.is_terminal)
