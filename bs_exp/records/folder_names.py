"""Names of the folders of sweeps and points: words that read like settings, and a hash by which they are found.

The words may change from version to version; a folder that carries the hash is the right one whatever it is called.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

# Digits of a configuration's hash in the name of a point's folder.
_DIGITS = 12
_LONGEST_WORDS = 64
# A path with these needs no quotes in a shell, nor as the value of a setting: no `=` and no comma.
_NO_WORD = re.compile(r"[^\w.@+-]+")
_BRACKETS = re.compile(r"[\[\](){}'\"]")
_VARIES = re.compile(r"=[^\[{]*,|\w\(")
_NO_SWEEP = re.compile(r"[^\w.,=+-]+")


def run_words(method: str, ratio: object, settings: Iterable[str] = ()) -> list[str]:
    """What names a run: `method@ratio`, then its other settings (`KEY=VALUE`) but for these two, as they are."""
    head = f"{method}@{ratio:g}" if isinstance(ratio, int | float) else method
    return [head, *(s for s in settings if s.split("=")[0] not in ("experiment", "retain_ratio", "name", "sweeps"))]


def point_folder(sweep: Path | None, config_hash: str, words: Iterable[str] = ()) -> str:
    """The name of a point's folder in the folder of its sweep: the one it has, or `svd@0.8+group_size-2-0a1b2c3d4e5f`.

    An existing folder is found by the hash alone, as earlier versions called it.
    """
    digits = config_hash[:_DIGITS]
    plain = (_NO_WORD.sub("-", _BRACKETS.sub("", _short(word))).strip("-") for word in words)
    name = f"{_cut('+'.join(word for word in plain if word), '+')}-{digits}".removeprefix("-")
    return _known(sweep, name, digits) if sweep is not None else name


def words_of(folder: str, config_hash: str) -> str | None:
    """What the name of a point's folder says besides the hash; None for the folder of anything else."""
    words, sign, digits = folder.rpartition("-")
    return words.replace("+", " ") if sign and digits == config_hash[:_DIGITS] else None


def sweep_folder(parent: Path | None, name: str, settings: Iterable[str], digits: str) -> str:
    """The name of a sweep's folder that a plain name cannot tell: what varies first, cut where it is long; a hash."""
    varied: list[str] = []
    fixed: list[str] = []
    for setting in settings:
        words = _NO_SWEEP.sub("-", _BRACKETS.sub("", f"{_key(setting)}={setting.partition('=')[2]}")).strip("-")
        (varied if _VARIES.search(setting) else fixed).append(words)
    folder = f"{_cut(','.join([name, *varied, *fixed]), ',')}-{digits}"
    return _known(parent, folder, digits) if parent is not None else folder


def _key(setting: str) -> str:
    """The last part of a setting's key, with its place in a list: `group_size`, `by_depth.0`."""
    parts = setting.partition("=")[0].lstrip("+~").split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _short(word: str) -> str:
    """A setting without the beginning of its key: `sharing.group_size=2` is `group_size-2`."""
    _, sign, value = word.partition("=")
    return f"{_key(word)}-{value}" if sign else word


def _cut(words: str, sign: str) -> str:
    """The words up to the last sign that fits."""
    if len(words) <= _LONGEST_WORDS:
        return words
    return (words[: _LONGEST_WORDS + 1].rpartition(sign)[0] or words[:_LONGEST_WORDS]).rstrip("-+,.")


def _known(parent: Path, name: str, digits: str) -> str:
    if (parent / name).is_dir():
        return name
    try:
        # One of them, whichever: always the same.
        found = sorted(e.name for e in os.scandir(parent) if e.name.split("-")[-1] == digits and e.is_dir())
    except OSError:  # no such folder yet
        return name
    return found[0] if found else name
