"""What every sharing keeps: each matrix in one group of its kind, no look at what was not asked for, and its word."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import pytest
from torch import Tensor

from bs_exp.errors import ConfigError
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import seen_by
from bs_exp.protocols import Sharing
from bs_exp.testing.measures import GivenMeasures, architecture, problem, random_measures
from bs_exp.types import Architecture, GroupStatistics, LoadedModel, LossUnit, Metric, Spectrum, Statistic, WeightGroup


class SharingContract:
    """Subclass it as `TestMine`, with a fixture `sharing` that returns the strategy."""

    @pytest.fixture(scope="class")
    @classmethod
    def sharing(cls) -> Sharing:
        """The strategy."""
        raise NotImplementedError("override the fixture `sharing`: it returns the strategy.")

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, sharing: Sharing) -> Architecture:
        """A tiny model of five layers as the strategy sees it."""
        return seen_by(sharing, dense(5)).architecture

    @pytest.fixture(scope="class")
    @classmethod
    def groups(cls, sharing: Sharing, model: Architecture) -> tuple[WeightGroup, ...]:
        """Its groups there."""
        return grouped(sharing, model)

    def takes_any_model(self, sharing: Sharing) -> bool:
        """Whether the strategy asks nothing of a model: override it if so. Others refuse one with unknown matrices."""
        return False

    @pytest.mark.parametrize("layers", [5, 6])
    def test_every_matrix_is_in_exactly_one_group_of_its_kind(self, sharing: Sharing, layers: int) -> None:
        model = seen_by(sharing, dense(layers)).architecture
        groups = grouped(sharing, model)
        members = [(group.matrix, layer) for group in groups for layer in group.layers]
        assert sorted(members) == sorted(model.by_position)
        for group in groups:
            assert list(group.layers) == sorted(group.layers)
            for layer in group.layers:
                matrix = model.by_position[group.matrix, layer]
                assert (group.d_in, group.d_out) == (matrix.d_in, matrix.d_out)
        assert sum(group.parameters for group in groups) == model.parameters == dense(layers).architecture.parameters

    def test_same_in_same_out(self, sharing: Sharing, groups: tuple[WeightGroup, ...]) -> None:
        """Of the same object again, and of a copy with the same settings."""
        for strategy in (sharing, copy.deepcopy(sharing)):
            assert grouped(strategy, seen_by(strategy, dense(5)).architecture) == groups

    def test_a_model_without_its_matrices_is_refused_before_any_work(
        self, sharing: Sharing, model: Architecture
    ) -> None:
        """Before there are measures; and who asks nothing of a model takes every one."""
        strange = replace(dense(5), architecture=architecture(5, q_a=(8, 8)))
        if self.takes_any_model(sharing):
            sharing.check(seen_by(sharing, strange).architecture)
            return
        with pytest.raises(ConfigError, match="q_a"):
            sharing.check(seen_by(sharing, strange).architecture)
        sharing.check(model)

    def test_only_the_statistics_that_are_needed_are_looked_at(
        self, sharing: Sharing, model: Architecture, groups: tuple[WeightGroup, ...]
    ) -> None:
        """The metric has its own."""
        if not sharing.measured:
            assert not sharing.needs  # and there are no measures to look at
            return
        known = random_measures(model, unit=unit_of(sharing))
        assert sharing.groups(problem(model, Sparing(known, sharing.needs))) == groups

    def test_who_adds_up_nats_takes_nothing_else(self, sharing: Sharing, model: Architecture) -> None:
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


@cache
def dense(layers: int) -> LoadedModel:
    """A tiny model of so many layers."""
    return tiny_random("llama", layers=layers)


def unit_of(sharing: Sharing) -> LossUnit:
    """A unit that the strategy can work in."""
    return LossUnit.NATS if sharing.in_nats else LossUnit.OUTPUT_NORM


def grouped(sharing: Sharing, model: Architecture) -> tuple[WeightGroup, ...]:
    """The groups that a strategy makes of new measures."""
    measures = random_measures(model, unit=unit_of(sharing)) if sharing.measured else None
    return sharing.groups(problem(model, measures))


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
