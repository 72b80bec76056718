"""JSON on disk, read with suspicion: a file that another program wrote or cut gives a RecordError, never a traceback.

A `Check` takes the name of a field and its value, and raises RecordError unless the value is of the kind it stands for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from bs_exp.errors import RecordError
from bs_exp.files import name_fault, read_text

Check = Callable[[str, Any], None]

# Levels of lists and objects; what runs write has about ten.
_DEEPEST = 100
# Larger numbers overflow where tables and logarithmic axes calculate. As a perplexity, this is 575 nats per token.
LARGEST = 1e250
# A record of a model with thousands of matrices takes 2 MiB.
_MOST_BYTES = 32 * 2**20
_MOST_VALUES = 2_000_000
# Of a name in a message.
_SHOWN = 60
_SURROGATE = re.compile("[\ud800-\udfff]")
_NOT_IN_JSON = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file, not yet decoded; RecordError if it cannot be read or is none. `what`: "a record".

    Above 32 MiB or about two million values it is refused: what is made of it would take hours.
    """
    try:
        content = read_text(path, most_bytes=_MOST_BYTES)
        if (commas := content.count(",")) > _MOST_VALUES:
            raise RecordError(f"{path} holds about {commas:,} values, at most {_MOST_VALUES:,} are read: not {what}.")
        data = json.loads(content)
    except OSError as error:
        raise RecordError(f"Cannot read {what} {path}: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not JSON ({error}): half-written, or not {what}.") from error
    if not isinstance(data, dict):
        raise RecordError(f"{path} holds no JSON object: not {what}.")
    return data


def encode(value: Any) -> Any:
    """Plain data for strict JSON: numbers that JSON lacks become texts, and lone surrogates are spelled out."""
    match value:
        case float() if not math.isfinite(value):
            return next(name for name, number in _NOT_IN_JSON.items() if str(number) == str(value))
        case str():
            return str(value).encode("utf-8", "backslashreplace").decode()
        case Mapping():
            return {encode(str(key)): encode(item) for key, item in value.items()}
        case list() | tuple():
            return [encode(item) for item in value]
        case _:
            return value


def decode(value: Any, name: str = "", level: int = 0) -> Any:
    """The inverse of `encode` for the value of the field `name`, or for a whole object.

    RecordError for nesting above 100 levels, finite numbers beyond 1e250, and texts that are not Unicode.
    """
    if level > _DEEPEST:
        raise RecordError(f"{re.split(r'[.[]', name)[0]} is nested deeper than {_DEEPEST} levels: damaged.")
    match value:
        case str():
            if not _is_unicode(value):
                raise RecordError(f"{name} holds half of a surrogate pair ({value!a:.60}), which is no text: damaged.")
            return _NOT_IN_JSON.get(value, value)
        case dict():
            if wrong := [key for key in value if not _is_unicode(key)]:
                raise RecordError(f"{name} has an entry called {wrong[0]!a:.60}, which is no text: damaged.")
            inside = f"{name}." if name else ""
            # Whole keys would make the names quadratic in the size of the file.
            return {
                key: item if _is_number(item) else decode(item, f"{inside}{key[:_SHOWN]}", level + 1)
                for key, item in value.items()
            }
        case list():
            return [
                item if _is_number(item) else decode(item, f"{name}[{i}]", level + 1) for i, item in enumerate(value)
            ]
        case int() | float() if math.inf > abs(value) > LARGEST:
            raise RecordError(f"{name} is beyond {LARGEST:g}, too large to compare: damaged.")
        case _:
            return value


def _is_number(value: Any) -> bool:
    """Whether a value is a number that needs no look: most of a record, so that names are not made for them."""
    return type(value) in (int, float) and abs(value) <= LARGEST


def _is_unicode(text: str) -> bool:
    return _SURROGATE.search(text) is None


def check_fields(data: Mapping[str, Any], checks: Mapping[str, Check], optional: frozenset[str], what: str) -> None:
    """RecordError unless exactly these fields are there, those in `optional` perhaps, each of its kind."""
    if unknown := sorted(data.keys() - checks.keys()):
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise RecordError(f"unknown fields {', '.join(name[:_SHOWN] for name in unknown[:5])}{more}.")
    if missing := [name for name in checks if name not in data and name not in optional]:
        raise RecordError(f"fields missing: {', '.join(missing)}: not {what}.")
    for name, value in data.items():
        try:
            checks[name](name, value)
        except RecordError as error:
            raise RecordError(f"{error}: damaged, or not {what}.") from error


def _limit(name: str, found: int, most: int, unit: str) -> None:
    if found > most:
        raise RecordError(f"{name} has {found:,} {unit}, at most {most:,} are read")


def _refuse(name: str, kind: str, value: Any) -> None:
    raise RecordError(f"{name} is no {kind} (it is {value!r:.60})")


def text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        _refuse(name, "text", value)


def text_up_to(most: int) -> Check:
    """A text of at most so many characters."""

    def check(name: str, value: Any) -> None:
        text(name, value)
        _limit(name, len(value), most, "characters")

    return check


def plain_name(name: str, value: Any) -> None:
    """The name of a file or folder that stays in the folder it is put in."""
    text(name, value)
    if fault := name_fault(value):
        raise RecordError(f"{name} {fault} (it is {value!r:.60})")


def number(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        _refuse(name, "number", value)


def number_or_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        number(name, value)


def count(name: str, value: Any) -> None:
    """A whole number of at least 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        _refuse(name, "whole number of at least 0", value)


def positive(name: str, value: Any) -> None:
    """A whole number of at least 1, as the dimension of a matrix."""
    count(name, value)
    if value == 0:
        _refuse(name, "whole number of at least 1", value)


def below(limit: int, check_number: Check) -> Check:
    """A number below a limit."""

    def check(name: str, value: Any) -> None:
        check_number(name, value)
        if value >= limit:
            _refuse(name, f"number below {limit:,}", value)

    return check


def truth(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        _refuse(name, "true or false", value)


def moment(name: str, value: Any) -> None:
    """A time in ISO 8601 with its offset from UTC."""
    try:
        known = isinstance(value, str) and datetime.fromisoformat(value).utcoffset() is not None
    except ValueError:
        known = False
    if not known:
        _refuse(name, "time in ISO 8601 with an offset, as 2026-01-31T12:00:00+00:00", value)


def json_object(name: str, value: Any) -> None:
    """An object of any content."""
    if not isinstance(value, Mapping):
        _refuse(name, "JSON object", value)


def object_up_to(most: int) -> Check:
    """An object of any content, with at most so many entries in it and in the objects and lists within."""

    def check(name: str, value: Any) -> None:
        json_object(name, value)
        _limit(name, _entries(value), most, "entries")

    return check


def _entries(value: Any) -> int:
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return len(items) + sum(map(_entries, items))


def one_of(*allowed: str) -> Check:
    def check(name: str, value: Any) -> None:
        if value not in allowed:
            _refuse(name, f"word of {', '.join(allowed)}", value)

    return check


def or_null(check_other: Check) -> Check:
    def check(name: str, value: Any) -> None:
        if value is not None:
            check_other(name, value)

    return check


def list_of(check_item: Check, most: int = _MOST_VALUES) -> Check:
    """A list of at most so many items, all of one kind."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, list | tuple):
            _refuse(name, "list", value)
        _limit(name, len(value), most, "items")
        for i, item in enumerate(value):
            check_item(f"{name}[{i}]", item)

    return check


def filled(check_list: Check) -> Check:
    """A list that is not empty."""

    def check(name: str, value: Any) -> None:
        check_list(name, value)
        if not value:
            _refuse(name, "list with something in it", value)

    return check


def object_of(check_item: Check, most: int = _MOST_VALUES) -> Check:
    """An object with any names, at most so many, whose values are all of one kind."""

    def check(name: str, value: Any) -> None:
        json_object(name, value)
        _limit(name, len(value), most, "entries")
        for key, item in value.items():
            check_item(f"{name}.{key[:_SHOWN]}", item)

    return check


def object_with(required: frozenset[str] = frozenset(), **checks: Check) -> Check:
    """An object whose entries of these names, where it has them, are of these kinds; others may be anything."""

    def check(name: str, value: Any) -> None:
        json_object(name, value)
        if missing := sorted(required - value.keys()):
            raise RecordError(f"{name}.{missing[0]} is missing")
        for key, check_item in checks.items():
            if key in value:
                check_item(f"{name}.{key}", value[key])

    return check
