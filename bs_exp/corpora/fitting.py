"""Windows that are longer than the model's context, shortened to it."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from typing import Any, TypeVar, cast

from bs_exp.corpora.windows import fitting_length
from bs_exp.errors import BsExpError
from bs_exp.types import LoadedModel

Settings = TypeVar("Settings")


def fitted(settings: Settings, model: LoadedModel) -> Settings:
    """The settings of a calibration or an evaluator with a `sequence_length` that the model has positions for.

    The same object where it fits, or has no such setting; a `stride` never exceeds the length.
    """
    length = getattr(settings, "sequence_length", None)
    if not isinstance(length, int) or not is_dataclass(settings):
        return settings
    try:
        allowed = fitting_length(length, model, getattr(settings, "feeding", None))
    except BsExpError:  # the model cannot be fed so at all, which the check of these settings says better
        return settings
    if allowed >= length or allowed < 1:
        return settings
    changes: dict[str, Any] = {"sequence_length": allowed}
    stride = getattr(settings, "stride", None)
    if isinstance(stride, int) and stride > allowed:
        changes["stride"] = allowed
    given: Any = settings
    return cast(Settings, replace(given, **changes))


def told(what: str, settings: Any, shortened: Any) -> str:
    """The note to give where `fitted` changed something: `what` names the windows."""
    return (
        f"{what} windows of {shortened.sequence_length:,} tokens instead of {settings.sequence_length:,}: the model's "
        "context"
    )
