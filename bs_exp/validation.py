"""Checks of settings, shared by the strategies; the keyword names of settings appear in the messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from bs_exp.errors import ConfigError

_SMALLEST_STEP = 0.001
_LONGEST_SHOWN = 100
_MOST_SHOWN = 50


def check_choice(setting: str, value: str, allowed: Sequence[str]) -> None:
    """ConfigError, with the allowed values, if a setting is none of them."""
    if value not in allowed:
        raise ConfigError(f"{setting} must be one of {', '.join(allowed)}, got {shown(value)}.")


def check_at_least(minimum: int, **settings: int | None) -> None:
    """ConfigError unless every setting that is not None is a whole number of at least `minimum`."""
    for setting, value in settings.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
            raise ConfigError(f"{setting} must be a whole number of at least {minimum}, got {shown(value)}.")


def check_number(minimum: float, **settings: float | None) -> None:
    """ConfigError unless every setting that is not None is a finite number of at least `minimum`."""
    for setting, value in settings.items():
        if value is not None and not (is_number(value) and minimum <= value < float("inf")):
            raise ConfigError(f"{setting} must be a finite number of at least {minimum:g}, got {shown(value)}.")


def check_positive(**settings: float | None) -> None:
    """ConfigError unless every setting that is not None is a finite number above 0."""
    for setting, value in settings.items():
        if value is not None and not (is_number(value) and 0.0 < value < float("inf")):
            raise ConfigError(f"{setting} must be a finite number above 0, got {shown(value)}.")


def check_share(*, above: float | None = None, **settings: float) -> None:
    """ConfigError unless every setting lies in [0, 1), or in (`above`, 1] where `above` is given."""
    for setting, value in settings.items():
        if above is None and not (is_number(value) and 0.0 <= value < 1.0):
            raise ConfigError(f"{setting} must be at least 0 and below 1, got {shown(value)}.")
        if above is not None and not (is_number(value) and above < value <= 1.0):
            raise ConfigError(f"{setting} must be above {above:g} and at most 1, got {shown(value)}.")


def check_step(**settings: float) -> None:
    """ConfigError for steps below 0.001, which would need too many rounds, each a pass over the calibration windows."""
    for setting, value in settings.items():
        if value < _SMALLEST_STEP:
            raise ConfigError(
                f"{setting} must be at least {_SMALLEST_STEP} (a thousand rounds from dense to nothing), got {value}. "
                "One round is schedule=single."
            )


def check_unit(meaning: str = "", **settings: float | None) -> None:
    """ConfigError unless every setting that is not None lies in [0, 1]; the message has `meaning` after the bounds."""
    for setting, value in settings.items():
        if value is not None and not (is_number(value) and 0.0 <= value <= 1.0):
            raise ConfigError(f"{setting} must be between 0 and 1{meaning}, got {shown(value)}.")


def check_names(setting: str, value: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple; ConfigError if they are no list of texts (one text would be taken letter by letter)."""
    if isinstance(value, str) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{setting} must be a list of names, as in [q,k,v], got {shown(value)}.")
    if twice := [name for name, count in Counter(value).items() if count > 1]:
        raise ConfigError(f"{setting} names {twice[0]} twice, got {list(value)}; take one of them out.")
    return tuple(value)


def check_retain_ratio(ratio: float) -> None:
    """ConfigError unless the ratio lies in (0, 1]."""
    if not 0.0 < ratio <= 1.0:
        raise ConfigError(
            f"retain_ratio must be above 0 and at most 1 (the share of the targeted parameters to keep), got {ratio}. "
            "A compression ratio of 20 % is retain_ratio=0.8."
        )


def check_seed(seed: int) -> None:
    """ConfigError unless the seed is a whole number of 32 bits: NumPy's legacy generator takes no more."""
    check_at_least(0, seed=seed)
    if seed >= 2**32:
        raise ConfigError(f"seed must be at most {2**32 - 1}, got {seed}.")


def check_objective(objective: str | Sequence[str] | None) -> None:
    """ConfigError unless the objective is None, a name, or a list of different names."""
    names = [objective] if isinstance(objective, str | None) else objective
    if objective is not None and not (isinstance(names, list | tuple) and all(isinstance(n, str) for n in names)):
        raise ConfigError(f"objective must be the name of a metric, a list of names, or null, got {shown(objective)}.")
    if len(set(names)) < max(len(names), 1):
        raise ConfigError(
            f"objective must name a metric, or several different ones, got {list(names)}; null is the first "
            "perplexity, or cosine where there is none."
        )


def is_number(value: object) -> bool:
    """Whether a setting is an int or a float; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_plain(value: object) -> bool:
    """Whether a value given in place of a strategy is plain data instead of an object made from a `_target_`."""
    return value is None or isinstance(value, str | int | float | list | tuple | dict)


def shown(value: object) -> str:
    """A setting's value as it is written in settings (null, true, [a, b]), long ones shortened to 100 characters."""
    if isinstance(value, str):
        text = repr(value)
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{name}: {shown(inner)}" for name, inner in islice(value.items(), _MOST_SHOWN)) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(shown(inner) for inner in value[:_MOST_SHOWN]) + "]"
    else:
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 4]} ..."
