"""Configurations as flat settings, and which of these differ between the runs of a study."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bs_exp.records.settings import WITHOUT_EFFECT
from bs_exp.reporting import formats

Flat = Mapping[str, Any]

# What does not change a result, and what has a place of its own in the report.
_ELSEWHERE = WITHOUT_EFFECT | {"objective", "retain_ratio", "model", "evaluation"}
_TARGET = "_target_"
# Absolute, below home or this folder, or three names deep: ids of hubs have two.
_PATH = re.compile(r"(?<![^\s\[,])(?:(?:~|\.{1,2})?/[^\s,\[\]]*|[^\s,\[\]/]+(?:/[^\s,\[\]/]+){2,})(?<!/)")
_MOST_PARTS = 4
# A study turns a few dials; of records that have nothing in common, the first settings are enough to tell them apart.
_MOST_DIALS = 200
# What is evaluated, which changes no number by itself.
_JUDGED_APART = ("evaluators", "parts")


def flatten(node: Any, key: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists, empty nodes and what a strategy's dial maps are values."""
    if not isinstance(node, Mapping) or not node:
        return {key: node} if key else {}
    found: dict[str, Any] = {}
    for name, item in node.items():
        inner = f"{key}.{name}" if key else str(name)
        is_value = _TARGET in node and isinstance(item, Mapping) and _TARGET not in item
        found |= {inner: item} if is_value else flatten(item, inner)
    return found


def recipe_dials(config: Mapping[str, Any], choices: Mapping[str, str]) -> dict[str, Any]:
    """All dials of the compression, flat; a group's option under its own name where the record knows it."""
    return _flat({name: node for name, node in config.items() if name not in _ELSEWHERE}, choices)


def protocol_dials(config: Mapping[str, Any], choices: Mapping[str, str]) -> dict[str, Any]:
    """The settings that must agree before two results are compared: those of the model and of the evaluation."""
    model, evaluation = config.get("model"), config.get("evaluation")
    # The device changes speeds, which are told apart in their own tables.
    made = {k: v for k, v in model.items() if k != "device"} if isinstance(model, Mapping) else {}
    judged = {k: v for k, v in evaluation.items() if k not in _JUDGED_APART} if isinstance(evaluation, Mapping) else {}
    # A model has a name of its own.
    return flatten({"model": made}) | _flat({"evaluation": judged}, choices)


def _flat(groups: Mapping[str, Any], choices: Mapping[str, str]) -> dict[str, Any]:
    return flatten(groups) | {f"{group}.{_TARGET}": choices[group] for group in groups if group in choices}


def varying(families: Iterable[Sequence[Flat]]) -> list[str]:
    """Keys whose values differ within a family of points (those of one method), without keys that repeat another.

    The options of a group first, then dials; of two keys that always change together, the shorter one.
    """
    families = [family for family in families if len(family) > 1]
    keys = dict.fromkeys(key for family in families for flat in family for key in flat)
    changing = [key for key in keys if any(len({_mark(flat, key) for flat in family}) > 1 for family in families)]
    kept: list[str] = []
    changing.sort(key=lambda key: (not key.endswith(_TARGET), key.count("."), len(key), key))
    for key in changing[:_MOST_DIALS]:
        if not any(_repeats(key, other, families) for other in kept):
            kept.append(key)
    return kept


def _repeats(key: str, other: str, families: Sequence[Sequence[Flat]]) -> bool:
    """Whether `key` follows from `other` in every family: the same split, or there only for one option of its group."""
    same_group = key.split(".")[0] == other.split(".")[0] and other.endswith(_TARGET)
    for family in families:
        pairs = {(_mark(flat, other), _mark(flat, key)) for flat in family}
        values, others = {value for _, value in pairs}, {value for value, _ in pairs}
        follows = len(pairs) == len(others)
        if not follows or (len(pairs) != len(values) and not same_group):
            return False
    return True


def _mark(flat: Flat, key: str) -> str:
    return formats.setting(flat[key]) if key in flat else formats.ABSENT


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Key -> its last parts, as many as are needed to distinguish the keys; a group's option has the group's name."""
    parts = {key: key.removesuffix(f".{_TARGET}").split(".") for key in keys}
    names: dict[str, str] = {}
    for key, words in parts.items():
        others = [other for other_key, other in parts.items() if other_key != key]
        length = next(
            (n for n in range(1, len(words)) if all(words[-n:] != other[-n:] for other in others)), len(words)
        )
        names[key] = ".".join(words[-length:])
    return names


def show(flat: Flat, key: str) -> str:
    """The value of a dial as text; an option is shown by the name of its file."""
    if key not in flat:
        return formats.ABSENT
    value = flat[key]
    return option(value) if key.endswith(_TARGET) and isinstance(value, str) else formats.setting(value)


def base_names(values: Iterable[str]) -> dict[str, str]:
    """Value -> the same with the last part of every path in it; as many parts as set different values apart."""
    whole = dict.fromkeys(values)
    for parts in range(1, _MOST_PARTS + 1):
        short = {value: _PATH.sub(lambda found: "/".join(found[0].split("/")[-parts:]), value) for value in whole}  # noqa: B023
        if len(set(short.values())) == len(short):
            return short
    return {value: value for value in whole}


def option(target: str) -> str:
    """The module of an import path: `bs_exp.sharing.none.NoSharing` is `none`."""
    return target.split(".")[-2] if "." in target else target  # an option's own name has no dots
