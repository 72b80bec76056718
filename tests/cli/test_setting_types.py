"""Settings against the types of constructors: what fits, what is said of what does not, and under which key."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import ModuleType
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from bs_exp.cli.setting_types import check_kind, source_key, wrong_settings
from bs_exp.protocols import Whitening


class Side(StrEnum):
    LEFT = "left"
    RIGHT = "right"


class Other:
    """No plain data."""


@pytest.mark.parametrize(
    ("hint", "fitting", "unfitting", "told"),
    [
        (int, [0, -3], [1.0, True, "1", None, [1], 2**63], "a whole number"),
        (float, [0, 1.5, float("inf")], [True, "1", None, float("nan"), 10**400], "a number"),
        (bool, [True, False], [0, 1, "true", None], "true or false"),
        (str, ["", "x"], [5, None, True, ["x"]], "text"),
        (int | None, [1, None], ["x", 1.5], "a whole number or null"),
        (Literal["a", "b"], ["a"], ["c", None, 1], "one of a, b"),
        (int | Literal["all"], [1, "all"], ["some", None], "a whole number or all"),
        (Side, ["left"], ["up", None, 0], "one of left, right"),
        (tuple[str, ...], [[], ["x"]], ["x", [1], None, {"x": 1}], "a list of names"),
        (Sequence[str], ["x", ["x"]], [5, [5], None], "a list of names"),
        (tuple[float, float], [[0, 1.5]], [[1], [1, 2, 3], ["a", 1], 1], "a list of 2 numbers"),
        (list[tuple[int, ...]], [[[1], []]], [[1], [["x"]]], "a list of lists of whole numbers"),
        (Mapping[str, float], [{}, {"a": 1}], [1, [1], None, {"a": "x"}], "a mapping of names to numbers"),
        (Mapping[str, Any], [{"a": None}], [1, None], "a mapping"),
        (Whitening, [{"_target_": "x.Y"}], [5, None, {"a": 1}], "a strategy"),
        (Any, [None, 5, "x"], [], ""),
        (Other, [None, 5, "x"], [], ""),
    ],
)
def test_values_and_types(hint: Any, fitting: list[Any], unfitting: list[Any], told: str) -> None:
    assert [value for value in fitting if check_kind("a.b", value, hint)] == []
    for value in unfitting:
        wrong = check_kind("a.b", value, hint)
        assert wrong is not None and wrong.key == "a.b", value
        assert wrong.message.startswith(f"a.b must be {told}"), wrong.message


def test_a_key_leads_to_the_setting_that_was_set() -> None:
    written = {
        "group": {"dial": 1, "corpus": {"files": "${group.files}"}, "files": [], "odd": "x${group.dial}"},
        "a": {"dial": "${group.dial}", "corpus": "${group.corpus}", "odd": "${group.odd}", "self": "${a.self}"},
    }
    assert source_key(written, "a.dial") == "group.dial"
    assert source_key(written, "a.corpus.files") == "group.files"
    assert source_key(written, "a.odd") == "group.odd"
    assert source_key(written, "a.absent.deeper") == "a.absent.deeper"
    assert source_key(written, "a.self") == "a.self"


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> str:
    """The import path of a module with strategies of others."""

    @dataclass(frozen=True, kw_only=True)
    class Mine:
        size: int
        share: float = 0.5
        inner: Unknown | None = None  # type: ignore[name-defined] # noqa: F821

    class Plain:
        def __init__(self, size: int, *, unknown: Unknown = None) -> None: ...  # type: ignore[name-defined] # noqa: F821

    def anything(**settings: int) -> None: ...

    module = ModuleType("their_strategies")
    for strategy in (Mine, Plain, anything):
        strategy.__module__ = module.__name__
        setattr(module, strategy.__name__, strategy)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


@pytest.mark.parametrize(
    ("node", "messages"),
    [
        ({"_target_": "Mine", "size": 2, "inner": {"x": 1}}, []),
        ({"_target_": "Mine", "size": "2"}, ["g.size must be a whole number, got '2'."]),
        ({"_target_": "Mine", "size": 2, "share": None}, ["g.share must be a number, got null."]),
        ({"_target_": "Mine", "share": 1}, ["g.size must be set: "]),
        ({"_target_": "Mine", "size": 1, "sizes": 2}, ["g.sizes does not exist. Did you mean size?"]),
        (
            {"_target_": "Mine", "size": 1, "inner": {"_target_": "Mine", "size": []}},
            ["g.inner.size must be a whole number, got []."],
        ),
        ({"_target_": "Plain", "size": "x", "unknown": 1}, ["g.size must be a whole number, got 'x'."]),
        ({"_target_": "anything", "size": "x"}, []),
        ({"_target_": "nowhere", "size": "x"}, []),
    ],
)
def test_strategies_of_others_are_checked_too(foreign: str, node: dict[str, Any], messages: list[str]) -> None:
    def placed(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: f"{foreign}.{inner}" if key == "_target_" else placed(inner) for key, inner in value.items()}

    written = {"g": placed(node)}
    found = [wrong.message for wrong in wrong_settings(OmegaConf.create(written).g, "g", written)]
    assert len(found) == len(messages)
    for message, start in zip(found, messages, strict=True):
        assert message.startswith(start)
