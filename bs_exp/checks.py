"""Checks of settings that several strategies have in common."""

from __future__ import annotations

from collections.abc import Sequence

from bs_exp.errors import ConfigError


def check_choice(setting: str, value: str, allowed: Sequence[str]) -> None:
    """ConfigError with the options if a setting is none of them."""
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
        if value is not None and not minimum <= value < float("inf"):
            raise ConfigError(f"{setting} must be a finite number of at least {minimum:g}, got {value!r}.")


def check_share(*, above: float | None = None, **settings: float) -> None:
    """ConfigError unless every setting lies in [0, 1), or in (`above`, 1] where `above` is given."""
    for setting, value in settings.items():
        if above is None and not 0.0 <= value < 1.0:
            raise ConfigError(f"{setting} must be at least 0 and below 1, got {value}.")
        if above is not None and not above < value <= 1.0:
            raise ConfigError(f"{setting} must be above {above:g} and at most 1, got {value}.")
