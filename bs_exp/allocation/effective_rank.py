"""Ranks by the effective rank of the whitened weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from bs_exp.errors import ConfigError
from bs_exp.protocols import AllocationProblem, Layout
from bs_exp.rank_budget import by_type, check_affordable, make_plan, share_out
from bs_exp.types import RankPlan, Spectrum, Statistic, WeightGroup
from bs_exp.validation import check_share

_GIVERS, _TAKER = ("q", "k"), "v"


@dataclass(frozen=True, kw_only=True)
class EffectiveRank:
    """Within a matrix type `k_g = budget * sqrt(R_g / omega_g) / sum_j sqrt(R_j omega_j)`, `R` the effective rank.

    `R = exp(H)` with H the entropy of the shares `sigma^2 / sum(sigma^2)` of the whitened group, `omega = d_in + n
    d_out` the parameters of one component. It minimises `sum R_g / k_g` at a fixed number of parameters. Then a share
    `beta` of the parameters of q and k moves to v, evenly over its layers (the paper moves ranks, which is the same
    where the three have one shape; it prefers 0.3 to 0.4; 0 moves nothing). Parameters beyond those of a dense matrix
    go back to the other groups of its type, or of these three types.
    D-Rank (2509.25622), sections 3.2 to 3.4.
    """

    beta: float

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __post_init__(self) -> None:
        check_share(beta=self.beta)

    def check(self, groups: tuple[WeightGroup, ...], retain_ratio: float, layout: Layout) -> None:
        types = {group.matrix for group in groups}
        if self.beta and not types.issuperset((*_GIVERS, _TAKER)):
            raise ConfigError(
                f"allocation.beta={self.beta} moves parameters from q and k to v, and this model's matrix types are "
                f"{' '.join(sorted(types))}. Set allocation.beta=0."
            )
        check_affordable(groups, retain_ratio, layout, pool=self._pool)

    def allocate(self, problem: AllocationProblem) -> RankPlan:
        """Ranks that spend the budget up to less than one component.

        Raises ConfigError if one component per group exceeds the budget of its type, or beta asks for types that the
        model does not have.
        """
        groups = tuple(s.group for s in problem.spectra)
        self.check(groups, problem.retain_ratio, problem.layout)
        parameters = {s.group: math.sqrt(density(s) * price(s.group)) for s in problem.spectra}
        for matrix in {group.matrix for group in groups}:
            members = [group for group in groups if group.matrix == matrix]
            scale = sum(g.parameters for g in members) / sum(parameters[g] for g in members)
            parameters |= {g: scale * parameters[g] for g in members}
        if self.beta:
            self._move(parameters)
        wanted = [parameters[group] / group.parameters for group in groups]
        return make_plan(problem, share_out(problem, wanted, pool=self._pool))

    def _pool(self, group: WeightGroup) -> str:
        """Name of the pool to which a group belongs: parameters move within a pool only."""
        if self.beta and group.matrix in (*_GIVERS, _TAKER):
            return "types q, k and v"
        return by_type(group)

    def _move(self, parameters: dict[WeightGroup, float]) -> None:
        takers = [group for group in parameters if group.matrix == _TAKER]
        moved = 0.0
        for group in parameters:
            if group.matrix in _GIVERS:
                moved += self.beta * parameters[group]
                parameters[group] *= 1.0 - self.beta
        for group in takers:
            parameters[group] += moved * group.size / sum(taker.size for taker in takers)


def density(spectrum: Spectrum) -> float:
    """The effective rank `exp(H)`: 1 if one direction holds all energy, the full rank if all hold the same."""
    energy = spectrum.singular_values.double().square()
    shares = energy / energy.sum()
    return float(torch.special.entr(shares).sum().exp())


def price(group: WeightGroup) -> int:
    """Parameters of one component in the plain layout."""
    return group.d_in + group.columns
