"""Checks of settings, shared by the strategies; the keyword names of settings appear in the messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bs_exp.errors import ConfigError

_SMALLEST_STEP = 0.001


def check_choice(setting: str, value: str, allowed: Sequence[str]) -> None:
    """ConfigError, with the allowed values, if a setting is none of them."""
    if value not in allowed:
        raise ConfigError(f"{setting} must be one of {', '.join(allowed)}, got {value!r}.")


def check_at_least(minimum: int, **settings: int | None) -> None:
    """ConfigError unless every setting that is not None is a whole number of at least `minimum`."""
    for setting, value in settings.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
            raise ConfigError(f"{setting} must be a whole number of at least {minimum}, got {value!r}.")


def check_number(minimum: float, **settings: float | None) -> None:
    """ConfigError unless every setting that is not None is a finite number of at least `minimum`."""
    for setting, value in settings.items():
        if value is not None and not (is_number(value) and minimum <= value < float("inf")):
            raise ConfigError(f"{setting} must be a finite number of at least {minimum:g}, got {value!r}.")


def check_positive(**settings: float | None) -> None:
    """ConfigError unless every setting that is not None is a finite number above 0."""
    for setting, value in settings.items():
        if value is not None and not (is_number(value) and 0.0 < value < float("inf")):
            raise ConfigError(f"{setting} must be a finite number above 0, got {value!r}.")


def check_share(*, above: float | None = None, **settings: float) -> None:
    """ConfigError unless every setting lies in [0, 1), or in (`above`, 1] where `above` is given."""
    for setting, value in settings.items():
        if above is None and not (is_number(value) and 0.0 <= value < 1.0):
            raise ConfigError(f"{setting} must be at least 0 and below 1, got {value!r}.")
        if above is not None and not (is_number(value) and above < value <= 1.0):
            raise ConfigError(f"{setting} must be above {above:g} and at most 1, got {value!r}.")


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
            raise ConfigError(f"{setting} must be between 0 and 1{meaning}, got {value!r}.")


def check_names(setting: str, value: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple; ConfigError if they are no list of texts (one text would be taken letter by letter)."""
    if isinstance(value, str) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{setting} must be a list of names, as in [q,k,v], got {value!r}.")
    return tuple(value)


def is_number(value: object) -> bool:
    """Whether a setting is an int or a float; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_plain(value: object) -> bool:
    """Whether a value given in place of a strategy is plain data instead of an object made from a `_target_`."""
    return value is None or isinstance(value, str | int | float | list | tuple | dict)
