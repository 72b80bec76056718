"""Texts that others wrote, made harmless for a terminal, an XML file and a spreadsheet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Control characters (C0, C1), line and paragraph separators, marks that turn the direction of writing, halves of
# surrogate pairs, and code points that are no characters. XML allows few of them.
_HARMFUL = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\u200e\u200f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff"
_ANYWHERE = re.compile(f"[{_HARMFUL}]")
_IN_A_LINE = re.compile(f"[{_HARMFUL}\\t\\n]")
# Spreadsheets take a text that begins so for a formula, wide forms of the signs included.
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
_NUMBER = re.compile(r"[-+]?([\d.,]+(e[-+]?\d+)?( ?%)?)?", re.IGNORECASE)


def printable(text: str) -> str:
    r"""The text as one line: characters that control a terminal, tabs and line ends are spelled out, as `\x1b`."""
    return _IN_A_LINE.sub(_spelled, text)


def printable_lines(text: str) -> str:
    """The same with its line ends and tabs."""
    return _ANYWHERE.sub(_spelled, text)


def printable_data(value: Any, longest: int) -> Any:
    """Plain data of which every text, keys included, is printable and at most about `longest` characters long."""
    if value is None or isinstance(value, int | float):  # most of a record, so they come first
        return value
    match value:
        case str() if len(value) <= longest and value.isascii() and value.isprintable():
            return value
        case str():
            return printable_lines(shortened(value, longest))
        case dict() | Mapping():
            return {printable_data(str(key), longest): printable_data(item, longest) for key, item in value.items()}
        case list():
            return [printable_data(item, longest) for item in value]
        case tuple():
            return tuple(printable_data(item, longest) for item in value)
        case _:
            return value


def shortened(text: str, most: int) -> str:
    """The text, or its beginning and end with the number of characters left out; at most `most` of it stays."""
    if len(text) <= most:
        return text
    tail = most // 4
    return f"{text[: most - tail]} ... ({len(text) - most:,} characters) ... {text[len(text) - tail :]}"


def spreadsheet_cell(value: Any) -> Any:
    """A cell of a CSV file: numbers as they are, and texts that a spreadsheet would run as a formula after a `'`."""
    if isinstance(value, str) and value.startswith(_FORMULA) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def _spelled(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
