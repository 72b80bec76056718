"""The space of a search: Hydra's sweep syntax as Optuna's distributions, and a point as Hydra's overrides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Sweep, Transformer
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from bs_exp.errors import ConfigError

Value = bool | int | float | str | None


@dataclass(frozen=True)
class SearchSpace:
    """Parameters by key, and the overrides that every trial has in common."""

    distributions: Mapping[str, BaseDistribution]
    fixed: tuple[str, ...]

    def overrides(self, values: Mapping[str, Value]) -> list[str]:
        """The overrides of one point, `KEY=VALUE`; parameters without a value are left out."""
        return [*self.fixed, *(f"{key}={text(values[key])}" for key in self.distributions if key in values)]

    def anywhere(self) -> dict[str, Value]:
        """The first value of every parameter."""
        return {
            key: d.choices[0] if isinstance(d, CategoricalDistribution) else d.low
            for key, d in self.distributions.items()
            if isinstance(d, CategoricalDistribution | IntDistribution | FloatDistribution)
        }

    def end(self) -> dict[str, Value]:
        """The last value of every parameter."""
        return {
            key: d.choices[-1] if isinstance(d, CategoricalDistribution) else d.high
            for key, d in self.distributions.items()
            if isinstance(d, CategoricalDistribution | IntDistribution | FloatDistribution)
        }

    def options(self, key: str) -> tuple[Value, ...]:
        """The values of a categorical parameter; an empty tuple for a number."""
        distribution = self.distributions[key]
        return tuple(distribution.choices) if isinstance(distribution, CategoricalDistribution) else ()

    def describe(self) -> dict[str, str]:
        """The distribution of every parameter in words. Two distributions are equal if their words are."""
        return {key: _describe(distribution) for key, distribution in self.distributions.items()}


def parse_space(params: Mapping[str, Any], arguments: Iterable[str], parser: OverridesParser) -> SearchSpace:
    """The space of `hydra.sweeper.params` and of the command line, which wins where both set a key.

    `interval(a,b)` is continuous, or whole numbers inside `int(...)`; `choice(...)` and `a,b,c` are categories;
    `range(start,stop,step)` excludes `stop`, as in Hydra's own sweeps. `tag(log, ...)` searches in the logarithm.
    Raises ConfigError for anything else, and if nothing varies.
    """
    listed = [f"{key}={value if isinstance(value, str) else text(value)}" for key, value in params.items()]
    by_key = {o.get_key_element(): o for o in parser.parse_overrides([*listed, *arguments])}
    varied = {key: o for key, o in by_key.items() if o.is_sweep_override()}
    if not varied:
        raise ConfigError(
            "The search has no parameters: name some under hydra.sweeper.params, or on the command line, such as "
            "importance.p=interval(0,0.1)."
        )
    for key, override in varied.items():
        if override.is_hydra_override() or key != override.key_or_group:
            raise ConfigError(
                f"{override.input_line}: a search varies plain settings only (no hydra.*, +, ++, ~ or @)."
            )
    return SearchSpace(
        distributions={key: _distribution(override) for key, override in varied.items()},
        fixed=tuple(str(o.input_line) for key, o in by_key.items() if key not in varied),
    )


def text(value: Any) -> str:
    """A value in the syntax of overrides. Strings come from overrides and stay as they are."""
    return value if isinstance(value, str) else Transformer.str(value)


def _distribution(override: Override) -> BaseDistribution:
    sweep, line = override.value(), override.input_line
    tags = sweep.tags if isinstance(sweep, Sweep) else set()
    if unknown := tags - {"log"}:
        raise ConfigError(f"{line}: tag {', '.join(sorted(unknown))} is unknown. The only tag is log.")
    log = "log" in tags
    try:
        if isinstance(sweep, IntervalSweep):
            low, high = sweep.start, sweep.end
            if isinstance(low, int) and isinstance(high, int):
                return IntDistribution(low, high, log=log)
            return FloatDistribution(_number(low), _number(high), log=log)
        if isinstance(sweep, RangeSweep):
            return _range(sweep, log)
        if log:
            raise ConfigError(f"{line}: tag(log, ...) is for interval(...) and range(...), categories have no order.")
        # Numbers and booleans as they are, anything else as an override spells it.
        choices: dict[Any, None] = dict.fromkeys(override.sweep_iterator(transformer=Transformer.encode))
        return CategoricalDistribution(tuple(choices))
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"{line}: {error}") from error


def _range(sweep: RangeSweep, log: bool) -> BaseDistribution:
    given = sweep.range()
    values = given if isinstance(given, range) else list(given)
    if not values:
        raise ValueError("the range is empty; its end is not part of it.")
    low, high = sorted((values[0], values[-1]))
    if all(isinstance(v, int) for v in (sweep.start, sweep.stop, sweep.step)):
        return IntDistribution(int(low), int(high), log=log, step=abs(int(sweep.step)))
    # A decimal step: in binary the last value would lie beside the grid.
    step = float(abs(Decimal(str(sweep.step))))
    return FloatDistribution(float(low), float(high), log=log, step=step)


def _number(value: float | None) -> float:
    if value is None or not math.isfinite(value):
        raise ValueError(f"the ends of an interval must be finite numbers, got {value}.")
    return float(value)


def _describe(distribution: BaseDistribution) -> str:
    match distribution:
        case CategoricalDistribution(choices=choices):
            return f"one of {', '.join(text(choice) for choice in choices)}"
        case IntDistribution() | FloatDistribution():
            kind = "whole, " if isinstance(distribution, IntDistribution) else ""
            step = "" if distribution.step in (None, 1) else f", step {distribution.step}"
            return f"{kind}{distribution.low} to {distribution.high}{step}{', log' if distribution.log else ''}"
    raise TypeError(f"unknown distribution {distribution!r}")
