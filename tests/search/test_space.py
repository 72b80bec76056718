"""Hydra's sweep syntax as distributions, and points as overrides."""

from __future__ import annotations

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution as Choice
from optuna.distributions import FloatDistribution as Float
from optuna.distributions import IntDistribution as Int

from bs_exp.errors import ConfigError
from bs_exp.search.space import SearchSpace, parse_space


def parse(params: dict[str, Any] | None = None, *arguments: str) -> SearchSpace:
    return parse_space(params or {}, arguments, OverridesParser.create())


@pytest.mark.parametrize(
    ("value", "distribution"),
    [
        ("interval(0, 0.5)", Float(0.0, 0.5)),
        ("interval(1, 5)", Float(1.0, 5.0)),
        ("int(interval(1, 5))", Int(1, 5)),
        ("tag(log, interval(0.001, 1))", Float(0.001, 1.0, log=True)),
        ("tag(log, int(interval(1, 64)))", Int(1, 64, log=True)),
        ("a,b,null,2,0.5,true", Choice(("a", "b", "null", 2, 0.5, True))),
        ("[1,2],[3]", Choice(("[1,2]", "[3]"))),
        ("q,k", Choice(("q", "k"))),
        ("range(1, 5)", Int(1, 4)),  # without its end, as in Hydra's grids
        ("range(1, 8, 3)", Int(1, 7, step=3)),
        ("range(5, 1, -2)", Int(3, 5, step=2)),
        ("range(0, 1, 0.25)", Float(0.0, 0.75, step=0.25)),
    ],
)
def test_what_a_value_means(value: str, distribution: Any) -> None:
    space = parse({"key": value})
    assert space.distributions == {"key": distribution}
    if not isinstance(distribution, Choice):
        low, high = distribution.low, distribution.high
        assert [space.overrides({"key": v})[0] for v in (low, high)] == [f"key={low}", f"key={high}"]


def test_overrides_mean_what_was_chosen() -> None:
    """Every category comes back from Hydra's own parser as it went in."""
    space = parse({"key": "'a b',null,true,1e-5,[1,x],'x=y'"})
    found = OverridesParser.create().parse_overrides(
        [space.overrides({"key": value})[0] for value in space.options("key")]
    )
    assert [override.value() for override in found] == ["a b", None, True, 1e-5, [1, "x"], "x=y"]


def test_the_command_line_wins_over_the_file() -> None:
    params = {"a": "interval(0,1)", "b": "choice(1,2)", "c": 3, "d": [1, 2], "e": None, "f": True}
    space = parse(params, "sweeps=x", "b=7", "c=range(0,3)", "a=interval(0,2)")
    assert space.distributions == {"a": Float(0.0, 2.0), "c": Int(0, 2)}
    assert space.overrides({"a": 0.5, "c": 1}) == ["b=7", "d=[1,2]", "e=null", "f=True", "sweeps=x", "a=0.5", "c=1"]


def test_words_tell_parameters_apart() -> None:
    values = ["interval(0,1)", "interval(0,2)", "range(0,2)", "range(0,4,2)", "choice(0,1)", "tag(log,interval(1,2))"]
    assert len({parse({"key": value}).describe()["key"] for value in values}) == len(values)
    assert parse({"key": "interval(0.0,  1)"}).describe() == parse({"key": "interval(0, 1.0)"}).describe()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, r"no parameters.*hydra\.sweeper\.params.*interval\(0,0\.1\)"),
        ({"a": 1}, r"no parameters"),
        ({"a": "interval(2,1)"}, r"^a=interval\(2,1\): "),
        ({"a": "tag(log, interval(0,1))"}, r"^a=tag\(log, interval\(0,1\)\): "),
        ({"a": "interval(0,inf)"}, r"finite numbers, got inf"),
        ({"a": "range(3,3)"}, r"the range is empty; its end is not part of it"),
        ({"a": "tag(log, choice(1,2))"}, r"categories have no order"),
        ({"a": "tag(slow, interval(0,1))"}, r"tag slow is unknown. The only tag is log"),
        ({"+a": "interval(0,1)"}, r"varies plain settings only"),
    ],
)
def test_what_is_no_parameter_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(params)
