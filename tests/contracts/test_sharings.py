"""What every sharing keeps: each matrix in one group of its kind, no look at what was not asked for, and its word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import pytest
from torch import Tensor

from bs_exp.errors import ConfigError
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import seen_by
from bs_exp.protocols import Sharing
from bs_exp.types import GroupStatistics, LoadedModel, LossUnit, Metric, Spectrum, Statistic, WeightGroup
from tests.support.measures import GivenMeasures, architecture, problem, random_measures
from tests.support.options import option_of, options, strategy

ROWS = [
    "sharing=none",
    "sharing=all",
    "sharing=attention",
    "sharing=mlp",
    "sharing=paper sharing.group_size=1",
    "sharing=paper sharing.group_size=3",
    "sharing=paper sharing.group_size={q:2,up:5}",
    "sharing=explicit sharing.layers={q:[[0,3],[4,2]],down:[[1]]}",
    "sharing=clustered",
    "sharing=clustered sharing.space=weight sharing.min_size=2 sharing.max_size=3",
    "sharing=clustered sharing.clusters=2 sharing.max_size=null sharing.linkage=single",
    "sharing=criterion",
    "sharing=criterion sharing.norm=frobenius sharing.squared=true",
    "sharing=criterion sharing.norm=output sharing.max_size=2",
    "sharing=optimal sharing.g_max=3",
    "sharing=heads",
    "sharing=heads sharing.heads_per_block=1 sharing.group_size=3",
    "sharing=residual sharing.residual_rank=2",
]
EVERY = pytest.mark.parametrize("row", ROWS)


@cache
def seen(row: str, layers: int) -> LoadedModel:
    """A tiny model as the strategy sees it."""
    return seen_by(strategy(row), _dense(layers))


@cache
def _dense(layers: int) -> LoadedModel:
    return tiny_random("llama", layers=layers)


def unit_of(sharing: Sharing) -> LossUnit:
    """A unit that the strategy can work in."""
    return LossUnit.NATS if sharing.in_nats else LossUnit.OUTPUT_NORM


def grouped(row: str, layers: int) -> tuple[WeightGroup, ...]:
    """The groups that a new strategy makes of new measures."""
    sharing, model = strategy(row), seen(row, layers).architecture
    measures = random_measures(model, unit=unit_of(sharing)) if sharing.measured else None
    groups: tuple[WeightGroup, ...] = sharing.groups(problem(model, measures))
    return groups


known_groups = cache(grouped)


def test_every_option_has_a_row() -> None:
    assert {option_of(row) for row in ROWS} == options("sharing")


@EVERY
@pytest.mark.parametrize("layers", [5, 6])
def test_every_matrix_is_in_exactly_one_group_of_its_kind(row: str, layers: int) -> None:
    model, groups = seen(row, layers).architecture, known_groups(row, layers)
    members = [(group.matrix, layer) for group in groups for layer in group.layers]
    assert sorted(members) == sorted(model.by_position)
    for group in groups:
        assert list(group.layers) == sorted(group.layers)
        for layer in group.layers:
            matrix = model.by_position[group.matrix, layer]
            assert (group.d_in, group.d_out) == (matrix.d_in, matrix.d_out)
    assert sum(group.parameters for group in groups) == model.parameters == _dense(layers).architecture.parameters


@EVERY
def test_same_in_same_out(row: str) -> None:
    assert grouped(row, 5) == known_groups(row, 5)


@EVERY
def test_a_model_without_its_matrices_is_refused_before_any_work(row: str) -> None:
    """Before there are measures; and who asks nothing of a model takes every one."""
    sharing, strange = strategy(row), replace(_dense(5), architecture=architecture(5, q_a=(8, 8)))
    if option_of(row) == "none":
        sharing.check(seen_by(sharing, strange).architecture)
        return
    with pytest.raises(ConfigError, match="q_a"):
        sharing.check(seen_by(sharing, strange).architecture)
    sharing.check(seen(row, 5).architecture)


@EVERY
def test_only_the_statistics_that_are_needed_are_looked_at(row: str) -> None:
    """The metric has its own."""
    sharing, model = strategy(row), seen(row, 5).architecture
    if not sharing.measured:
        assert not sharing.needs  # and there are no measures to look at
        return
    known = random_measures(model, unit=unit_of(sharing))
    assert sharing.groups(problem(model, Sparing(known, sharing.needs))) == known_groups(row, 5)


@EVERY
def test_who_adds_up_nats_takes_nothing_else(row: str) -> None:
    sharing, model = strategy(row), seen(row, 5).architecture
    if not sharing.measured:
        assert not sharing.in_nats
        return
    norms = problem(model, random_measures(model, unit=LossUnit.OUTPUT_NORM))
    if sharing.in_nats:
        with pytest.raises(ConfigError, match="must be in nats, got output_norm"):
            sharing.groups(norms)
    else:
        assert sharing.groups(norms)
        assert sharing.groups(problem(model, random_measures(model, unit=LossUnit.NATS)))


@dataclass(frozen=True, eq=False)
class Sparing:
    """Measures that gathered what a strategy needs, and no more."""

    known: GivenMeasures
    needs: frozenset[Statistic]

    def weight(self, group: WeightGroup) -> Tensor:
        return self.known.weight(group)

    def statistics(self, group: WeightGroup) -> GroupStatistics:
        found = self.known.statistics(group)
        return found if Statistic.GRAM in self.needs else replace(found, gram=None)

    def metric(self, group: WeightGroup) -> Metric:
        return self.known.metric(group)

    def spectrum(self, group: WeightGroup) -> Spectrum:
        return self.known.spectrum(group)

    def track(self, groups: Sequence[WeightGroup], label: str) -> Iterator[WeightGroup]:
        return self.known.track(groups, label)
