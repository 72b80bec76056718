"""Numbers and times as a reader wants them."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from bs_exp.records import metrics

ABSENT = "-"
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_.,+-]")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def is_number(value: Any) -> TypeGuard[float]:
    """A number that can be compared: finite, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> str:
    """Four significant digits; large numbers whole, with separators."""
    match value:
        case None:
            return ABSENT
        case bool() | str():
            return str(value)
        case int():
            return f"{value:,}"
        case float() if not math.isfinite(value):
            return {"nan": "NaN", "inf": "∞", "-inf": "-∞"}[str(value)]
        case float() if abs(value) >= 1000:
            return f"{value:,.0f}"
        case float() if value != 0 and abs(value) < 0.001:
            return f"{value:.2e}"
        case float():
            return f"{value:.4g}"
        case _:
            return str(value)


def metric(name: str, value: Any) -> str:
    """A metric as it is printed: perplexities as `perplexity`, accuracies with three decimals."""
    if metrics.is_perplexity(name):
        return perplexity(value)
    return f"{value:.3f}" if metrics.is_accuracy(name) and is_number(value) else number(value)


def perplexity(value: Any) -> str:
    """Two decimals, as the papers print it; above 1000 the whole number."""
    if not is_number(value) or value >= 1000:
        return number(value)
    return f"{value:.2f}" if value < 100 else f"{value:.1f}"


def share(value: Any) -> str:
    """A share in per cent, without a decimal where there is none: 0.2 is `20 %`."""
    return f"{100 * value:.4g} %" if is_number(value) else number(value)


def percent(value: Any) -> str:
    """A share in per cent with two decimals, where small differences count."""
    return f"{100 * value:.2f} %" if is_number(value) else ABSENT


def change(new: Any, old: Any) -> str:
    """Relative change; empty where a ratio says nothing."""
    return f"{100 * (new / old - 1):+.1f} %" if is_number(new) and is_number(old) and old != 0 else ""


def seconds(value: Any) -> str:
    """Seconds, minutes or hours, whichever is short."""
    if not is_number(value):
        return number(value)
    if value < 120:
        return f"{value:.1f} s" if value >= 1 else f"{value:.2g} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def size(value: Any) -> str:
    """Bytes in binary units."""
    if not is_number(value):
        return number(value)
    power = min(int(math.log(value, 1024)), len(_BINARY) - 1) if value >= 1 else 0
    return f"{value / 1024**power:.{2 if power else 0}f} {_BINARY[power]}"


def setting(value: Any) -> str:
    """The value of a dial, as it would be typed."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case list() | tuple():
            return "[" + ", ".join(map(setting, value)) + "]"
        case Mapping():
            return "{" + ", ".join(f"{key}: {setting(item)}" for key, item in value.items()) + "}"
        case _:
            return str(value)


def file_key(name: str) -> str:
    """A metric's name as a part of file names and of anchors: what is not plain becomes `-` and a hash."""
    plain = _NOT_PLAIN.sub("-", name[:60])
    return plain if plain == name.replace("/", "-") else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def short(label: str, most: int = 30) -> str:
    """The label for a figure, which has room for few characters."""
    return label if len(label) <= most else f"{label[: most - 1]}…"


def sentence(words: str) -> str:
    """The words with a capital at the beginning; the others stay as they are."""
    return words[:1].upper() + words[1:]
