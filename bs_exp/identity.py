"""What identifies a strategy in the key of a result: its settings, and of code that is not ours the source too.

Our own strategies are told by `repr`: a change of their code that changes numbers comes with a new format version. Of
somebody else's class a key must hold the module, the qualified name and the source, or an edit would silently get the
old results.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
import secrets
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from enum import Enum
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

from bs_exp.source_code import is_foreign, is_own, sources

_PLAIN = (str, bytes, bool, int, float, complex, type(None))
_tokens: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def identity(strategy: object) -> Any:
    """What a key must hold of a strategy: `repr` where it and all that it is made of is ours.

    With code of others anywhere in it, plain data: every class with its settings, taken from its fields (or attributes)
    rather than from a `repr` that may hide some, and the hashes of the foreign code (`code_of`).
    """
    return _described(strategy, ()) if _holds_foreign(strategy, ()) else repr(strategy)


def own_code(strategy: object) -> dict[str, Any]:
    """`{"code": ...}` for a key that holds a strategy's settings but not its class; empty if that is ours."""
    return {"code": _code(type(strategy))} if is_foreign(type(strategy).__module__) else {}


def class_name(item: object) -> str:
    """Module and qualified name of a class or function, or of an object's class."""
    named = item if isinstance(item, type | FunctionType) else type(item)
    return f"{named.__module__}.{named.__qualname__}"


def code_of(item: type | FunctionType) -> dict[str, str]:
    """SHA-256 by module of the source of a foreign class, its foreign bases, and what these import (`sources`).

    What has no file (it was typed into an interpreter or a notebook), or is made by a function, gets a random token
    instead, which lasts as long as the object: its results are never found again by another process.
    """
    modules = {item.__module__}
    if isinstance(item, type):
        modules |= {base.__module__ for base in item.__mro__ if is_foreign(base.__module__)}
    found: dict[str, str] = {}
    for module in sorted(modules):
        own = sources(module)
        if not own:
            return {module: _token(item)}
        found |= own
    return {item.__module__: _token(item)} if "<" in item.__qualname__ else found


def _code(item: type | FunctionType) -> dict[str, Any]:
    return {"name": class_name(item), "sources": code_of(item)}


def _token(item: object) -> str:
    return _tokens.setdefault(item, f"process {secrets.token_hex(16)}")


def _holds_foreign(value: object, around: tuple[int, ...]) -> bool:
    if isinstance(value, _PLAIN) or id(value) in around:
        return False
    named = value if isinstance(value, type | FunctionType) else type(value)
    return is_foreign(named.__module__) or any(_holds_foreign(part, (*around, id(value))) for _, part in _parts(value))


def _parts(value: object) -> Iterator[tuple[str, Any]]:
    """What an object is made of, by name; nothing of what is opaque."""
    match value:
        case type() | FunctionType() | Enum():
            return
        case Mapping():
            for index, (key, part) in enumerate(value.items()):
                yield f"key {index}", key
                yield f"value {index}", part
        case list() | tuple():
            yield from ((str(index), part) for index, part in enumerate(value))
        case AbstractSet():
            yield from (("", part) for part in value)
        case functools.partial():
            yield from (("function", value.func), ("arguments", value.args), ("keywords", value.keywords))
        case MethodType():
            yield from (("object", value.__self__), ("function", value.__func__))
        case _ if is_dataclass(value):
            yield from ((field.name, getattr(value, field.name)) for field in fields(value))
        case _ if is_own(type(value).__module__) or is_foreign(type(value).__module__):
            yield from sorted(_attributes(value).items())


def _attributes(value: object) -> dict[str, Any]:
    """Attributes of an object, those in slots too."""
    slots = [name for base in type(value).__mro__ for name in _names(getattr(base, "__slots__", ()))]
    found = {name: getattr(value, name) for name in slots if not name.startswith("__") and hasattr(value, name)}
    return found | dict(getattr(value, "__dict__", {}))


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _described(value: object, around: tuple[int, ...]) -> Any:
    """An object as plain data, the same only for the same settings and code."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if id(value) in around:
        return "itself"
    inside = (*around, id(value))
    match value:
        case type() | FunctionType():
            return _code(value) if is_foreign(value.__module__) else class_name(value)
        case Enum():
            found: Any = f"{class_name(value)}.{value.name}"
        case list() | tuple():
            found = [_described(part, inside) for _, part in _parts(value)]
        case AbstractSet():
            found = sorted((_described(part, inside) for part in value), key=json.dumps)
        case _:
            parts = {name: _described(part, inside) for name, part in _parts(value)}
            known = isinstance(value, Mapping | functools.partial | MethodType) or is_dataclass(value)
            known |= is_own(type(value).__module__) or is_foreign(type(value).__module__)
            found = {"class": class_name(value), **({"settings": parts} if known else {"content": _content(value)})}
    return {"value": found, **own_code(value)} if is_foreign(type(value).__module__) else found


def _content(value: object) -> str:
    """A hash of a library's object, such as a tensor; of one that cannot be pickled a random token."""
    if type(value).__module__.partition(".")[0] == "torch":  # then it is imported, and a pickled tensor holds addresses
        import torch

        if isinstance(value, torch.Tensor):
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode() + data).hexdigest()
    try:
        return hashlib.sha256(pickle.dumps(value)).hexdigest()
    except (pickle.PicklingError, TypeError, AttributeError):
        return f"process {secrets.token_hex(16)}"
