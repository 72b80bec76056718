"""The contiguous groups of least predicted loss, chosen together with the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from bs_exp.errors import ConfigError
from bs_exp.protocols import SharingProblem
from bs_exp.rank_budget import Choices, at_price, cost_of, lowest_price, parameter_budget, spectrum_choices, spend
from bs_exp.sharing.layers import check_matrices, check_named, part, runs
from bs_exp.types import Architecture, Statistic, WeightGroup
from bs_exp.validation import check_at_least, check_names


@dataclass(frozen=True, kw_only=True)
class OptimalSharing:
    """Groups of at most `g_max` consecutive layers that, at their best ranks, lose least within the parameter budget.

    For a price per parameter, dynamic programming finds the grouping with the least `loss + price * parameters`, every
    group at its own best rank or dense; the price is found by bisection to the budget. Among the groupings of all tried
    prices, the one whose best ranks within the budget lose least is taken. Types that are not in `matrices` keep groups
    of one layer, but compete for the same budget. Only eigenvalues are computed for the candidates: `g_max` per matrix.
    Losses of different types are added, so they must be in nats: use whitening=two_sided, and allocation=water_filling
    to get these ranks.
    """

    matrices: tuple[str, ...]
    g_max: int

    measured: ClassVar[bool] = True
    in_nats: ClassVar[bool] = True
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrices", check_names("matrices", self.matrices))
        check_named(self.matrices)
        check_at_least(1, g_max=self.g_max)

    def check(self, architecture: Architecture) -> None:
        """ConfigError if no listed type occurs in the model."""
        check_matrices(self.matrices, architecture)

    def groups(self, problem: SharingProblem) -> tuple[WeightGroup, ...]:
        """All groups, ordered by matrix type and layer; ConfigError as in `check`, or if losses are not in nats."""
        self.check(problem.architecture)
        wholes = [run for matrix in problem.architecture.matrix_types for run in runs(problem.architecture, matrix)]
        candidates = self._candidates(wholes, problem)
        budget = parameter_budget(problem.architecture.parameters, problem.retain_ratio)
        groupings = _groupings(wholes, candidates, budget)

        def loss(grouping: tuple[WeightGroup, ...]) -> float:
            choices = [candidates[group] for group in grouping]
            chosen = at_price(choices, budget)
            if cost_of(choices, chosen) > budget:
                return float("inf")
            return sum(float(c.losses[i]) for c, i in zip(choices, spend(choices, chosen, budget), strict=True))

        return min(groupings, key=loss)

    def _candidates(self, wholes: Sequence[WeightGroup], problem: SharingProblem) -> Mapping[WeightGroup, Choices]:
        """The choices (ranks, parameters, losses) of every run of at most `g_max` layers."""
        assert problem.measures is not None
        possible = [
            part(whole, whole.layers[start:stop])
            for whole in wholes
            for start in range(whole.size)
            for stop in range(start + 1, min(start + self._largest(whole.matrix), whole.size) + 1)
        ]
        found = {}
        for group in problem.measures.track(possible, "comparing groups"):
            spectrum = problem.measures.spectrum(group)
            if not spectrum.unit.is_second_order:
                raise ConfigError(
                    f"sharing=optimal adds up losses of all matrix types, which must be in nats, got {spectrum.unit}. "
                    "Use whitening=two_sided, or sharing=criterion, which compares within a type."
                )
            found[group] = spectrum_choices(spectrum, problem.layout)
        return found

    def _largest(self, matrix: str) -> int:
        return self.g_max if matrix in self.matrices else 1


def _groupings(
    wholes: Sequence[WeightGroup], candidates: Mapping[WeightGroup, Choices], budget: int
) -> list[tuple[WeightGroup, ...]]:
    """The distinct groupings that are optimal at the prices tried by bisection to the budget, largest models first."""
    seen: dict[float, tuple[tuple[WeightGroup, ...], int]] = {}

    def at(price: float) -> int:
        grouping = tuple(group for whole in wholes for group in best_cut(whole, candidates, price))
        cost = sum(int(candidates[group].costs[candidates[group].best(price)]) for group in grouping)
        seen[price] = grouping, cost
        return cost

    lowest_price(at, budget)
    return list(dict.fromkeys(seen[price][0] for price in sorted(seen)))


def best_cut(whole: WeightGroup, candidates: Mapping[WeightGroup, Choices], price: float) -> list[WeightGroup]:
    """The contiguous groups of a run of layers, all of them candidates, with the least `loss + price * parameters`.

    Dynamic programming over where the last group begins; a tie goes to the smaller last group.
    """
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, whole.size + 1):
        found = (float("inf"), 0)
        for start in range(stop - 1, -1, -1):
            choices = candidates.get(part(whole, whole.layers[start:stop]))
            if choices is None:
                break
            choice = choices.best(price)
            value = best[start][0] + float(choices.losses[choice] + price * choices.costs[choice])
            found = min(found, (value, start), key=lambda option: option[0])
        best.append(found)
    stops = [whole.size]
    while stops[-1] > 0:
        stops.append(best[stops[-1]][1])
    return [part(whole, whole.layers[start:stop]) for start, stop in pairwise(reversed(stops))]
