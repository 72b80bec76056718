"""Settings against the types of the constructor that takes them, before anything is built.

The constructor of a strategy is the schema of its node: what its type hints say is checked here, also for strategies
of others. Its own checks, of ranges and of what belongs together, come after.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from importlib import import_module
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf

from bs_exp.cli.explain import list_options
from bs_exp.validation import is_number, shown

_TARGET = "_target_"
_SCALARS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "names"),
    types.NoneType: ("null", "null"),
}
_STRATEGY = ("a strategy with its _target_ (an option of its group)", "strategies with their _target_")
_LISTS = (list, tuple, Sequence)
_MAPPINGS = (dict, Mapping)
# References of references: more than this is a circle.
_MOST_JUMPS = 20
_MOST_WHOLE = 2**63 - 1
# A value that is another setting's; not a relative key, a resolver, or one with text around it.
_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")


@dataclass(frozen=True)
class WrongSetting:
    """A setting that its constructor does not take: its full key, and what to say of it."""

    key: str
    message: str


@dataclass(frozen=True)
class _Parameter:
    """A parameter of a constructor: its type hint (`Any` if unknown), and whether it has no default."""

    hint: Any
    required: bool


def wrong_settings(node: DictConfig, key: str, written: Any) -> tuple[WrongSetting, ...]:
    """The settings of the node at `key`, and of strategies inside it, whose values are not of the constructors' types.

    `written` is the whole configuration as plain data with its references, of which the full keys are told.

    Unknown and missing settings count too. Types that plain data cannot have are not looked at, nor what cannot be
    imported; a protocol stands for any strategy. A value taken from another key
    (`${evaluation.limit}`) is reported under that one.
    """
    return tuple(_wrong_inside(OmegaConf.to_container(node, resolve=True), key, written))


def check_kind(key: str, value: Any, hint: Any) -> WrongSetting | None:
    """What is wrong with a value for a setting of this type; None if it fits, or the type is none of plain data."""
    if _fits(value, hint):
        return None
    hints = ""
    if (is_number(value) or isinstance(value, bool)) and _fits("", hint):
        hints = f" In quotes it is text: \"{key}='{shown(value)}'\"."
    elif isinstance(value, int) and abs(value) > _MOST_WHOLE and _fits(0, hint):
        hints = f" At most {_MOST_WHOLE} can be counted."
    return WrongSetting(key, f"{key} must be {_told(hint)}, got {shown(value)}.{hints}")


def _wrong_kinds(key: str, value: Any, hint: Any) -> Iterator[WrongSetting]:
    """As `check_kind`, but element by element of a mapping."""
    members = get_args(hint) if _is_union(hint) else (hint,)
    of = next(((get_args(member) or (Any, Any))[1] for member in members if _outer(member) in _MAPPINGS), None)
    if isinstance(value, dict) and of is not None and _TARGET not in value:
        if _is_plain(of):
            for name, inner in value.items():
                yield from _wrong_kinds(f"{key}.{name}", inner, of)
    elif wrong := check_kind(key, value, hint):
        yield wrong


def _wrong_inside(value: Any, key: str, config: Any) -> Iterator[WrongSetting]:
    if isinstance(value, dict):
        if isinstance(value.get(_TARGET), str):
            yield from _wrong_arguments(value, key, config)
        for name, inner in value.items():
            yield from _wrong_inside(inner, source_key(config, f"{key}.{name}"), config)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _wrong_inside(inner, f"{key}.{index}", config)


def _wrong_arguments(node: Mapping[Any, Any], key: str, config: Any) -> Iterator[WrongSetting]:
    target = _imported(node[_TARGET])
    parameters = None if target is None else _parameters(target)
    if parameters is None:
        return
    given = {str(name): value for name, value in node.items() if not _is_hydras(str(name))}
    for name, value in given.items():
        place = source_key(config, f"{key}.{name}")
        if name not in parameters:
            yield WrongSetting(
                place, f"{key}.{name} does not exist. {list_options('Settings there', name, parameters)}"
            )
        else:
            yield from _wrong_kinds(place, value, parameters[name].hint)
    for name, parameter in parameters.items():
        if parameter.required and name not in given:
            yield WrongSetting(
                f"{key}.{name}",
                f"{key}.{name} must be set: {node[_TARGET]} has no default for it, as in +{key}.{name}=VALUE.",
            )


def parameter_names(target: str) -> set[str]:
    """What the constructor or function at an import path takes by name; empty if it takes any, or cannot be known."""
    return set(_parameters(_imported(target)) or ())


def source_key(config: Any, key: str) -> str:
    """The key from which a setting takes its value: its own, or where chains of `${...}` on the way to it lead.

    `config` is the whole configuration as plain data, not resolved.
    """
    done: list[str] = []
    value, left, jumps = config, key.split("."), 0
    while left:
        done.append(left.pop(0))
        value = value.get(done[-1]) if isinstance(value, dict) else None
        reference = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if reference and jumps < _MOST_JUMPS:
            done, value, left, jumps = [], config, [*reference[1].split("."), *left], jumps + 1
    return ".".join(done)


def _is_hydras(name: str) -> bool:
    """Whether a key is an instruction to `instantiate`, such as `_convert_`, and no setting."""
    return name.startswith("_") and name.endswith("_")


def _imported(target: str) -> Any:
    """The object of this import path; None if there is none, which `instantiate` says better."""
    module, _, name = target.rpartition(".")
    if not module or name.startswith("."):
        return None
    try:
        return getattr(import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def _parameters(target: Any) -> dict[str, _Parameter] | None:
    """The keyword parameters of a class or function by name; None if it takes any, or they cannot be known."""
    if isinstance(target, type) and is_dataclass(target):
        hints: dict[str, Any] = {}
        for owner in reversed(target.__mro__):
            hints |= _hints(inspect.get_annotations(owner), owner.__module__)
        return {
            field.name: _Parameter(hints.get(field.name, Any), field.default is field.default_factory is MISSING)
            for field in fields(target)
            if field.init
        }
    function = inspect.getattr_static(target, "__init__") if isinstance(target, type) else target
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    if isinstance(target, type):
        parameters = parameters[1:]
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in parameters):
        return None
    hints = _hints(getattr(function, "__annotations__", {}), getattr(function, "__module__", ""))
    return {p.name: _Parameter(hints.get(p.name, Any), p.default is p.empty) for p in parameters}


def _hints(annotations: Mapping[str, Any], module: str) -> dict[str, Any]:
    """The types that annotations name; without those that cannot be resolved (imported for type checkers alone)."""
    names = vars(sys.modules[module]) if module in sys.modules else {}
    found = {}
    for name, annotation in annotations.items():
        try:
            found[name] = typing.get_type_hints(types.SimpleNamespace(__annotations__={name: annotation}), names)[name]
        except (NameError, AttributeError, TypeError, SyntaxError):
            continue
    return found


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _is_protocol(hint: Any) -> bool:
    return isinstance(hint, type) and bool(getattr(hint, "_is_protocol", False))


def _is_plain(hint: Any) -> bool:
    """Whether it can be checked that a value is of this type: plain data all through, or a strategy's protocol."""
    if _is_union(hint) or _outer(hint) in (*_LISTS, *_MAPPINGS):
        return all(_is_plain(member) for member in get_args(hint) if member is not Ellipsis)
    if get_origin(hint) is Literal or (isinstance(hint, type) and issubclass(hint, StrEnum)):
        return True
    return _is_protocol(hint) or hint in _SCALARS


def _outer(hint: Any) -> Any:
    return get_origin(hint) or hint


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; True for all types that cannot be checked. Whole numbers are numbers."""
    if _outer(hint) in _MAPPINGS:
        of = (get_args(hint) or (Any, Any))[1]
        return isinstance(value, dict) and (not _is_plain(of) or all(_fits(inner, of) for inner in value.values()))
    if _outer(hint) in _LISTS:
        return _fits_list(value, hint)
    if not _is_plain(hint):
        return True
    if _is_union(hint):
        return any(_fits(value, member) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return any(value == allowed and type(value) is type(allowed) for allowed in get_args(hint))
    if hint is float:
        return is_number(value) and value == value and not (_is_whole(value) and abs(value) > sys.float_info.max)
    if hint is int:
        return _is_whole(value) and abs(value) <= _MOST_WHOLE
    if _is_protocol(hint):
        return isinstance(value, dict) and _TARGET in value
    if issubclass(hint, StrEnum):
        return value in [member.value for member in hint]
    return isinstance(value, hint)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fits_list(value: Any, hint: Any) -> bool:
    of = get_args(hint)
    if isinstance(value, str):  # a sequence of texts, which constructors take for a list of one
        return _outer(hint) is Sequence and of == (str,)
    if not isinstance(value, list):
        return False
    if _is_fixed(hint):
        return len(value) == len(of) and all(map(_fits, value, of))
    return not of or not _is_plain(of[0]) or all(_fits(inner, of[0]) for inner in value)


def _is_fixed(hint: Any) -> bool:
    """Whether a tuple has a type for each of its elements, and so a length."""
    return _outer(hint) is tuple and bool(get_args(hint)) and get_args(hint)[-1] is not Ellipsis


def _told(hint: Any, *, several: bool = False) -> str:
    """A type in a user's words, of one value (`a whole number or null`) or of several (`whole numbers`)."""
    if _is_union(hint):
        members = [_told(member, several=several) for member in get_args(hint)]
        return f"{', '.join(members[:-1])} or {members[-1]}"
    if get_origin(hint) is Literal or (isinstance(hint, type) and issubclass(hint, StrEnum)):
        allowed = [str(getattr(value, "value", value)) for value in (get_args(hint) or hint)]
        return allowed[0] if len(allowed) == 1 else f"{'any' if several else 'one'} of {', '.join(allowed)}"
    of = [_told(member, several=True) for member in get_args(hint) if _is_plain(member)]
    if _outer(hint) in _MAPPINGS:
        return f"{'mappings' if several else 'a mapping'}{f' of {of[0]} to {of[1]}' if len(of) > 1 else ''}"
    if _outer(hint) in _LISTS:
        start = "lists" if several else "a list"
        if _is_fixed(hint):
            return f"{start} of {len(of)} {of[0] if len(set(of)) == 1 else 'values'}"
        return f"{start}{f' of {of[0]}' if of else ''}"
    one, many = _STRATEGY if _is_protocol(hint) else _SCALARS[hint]
    return many if several else one
