"""Ranks by block, from the Fisher sensitivity of its weights and the effective rank of its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.errors import ConfigError
from bs_exp.protocols import AllocationProblem, Layout
from bs_exp.rank_budget import check_affordable, make_plan, mean_over_layers, share_out
from bs_exp.types import LayerProfile, RankPlan, Statistic, WeightGroup
from bs_exp.validation import check_choice, check_share

# sign -> bounds of a block's kept share where the user sets none
_BOUNDS = {"paper": (0.0, 1.0), "code": (0.3, 0.98)}
_MEASURES = ("singular_values", "energy")


@dataclass(frozen=True, kw_only=True)
class DipSvdHeuristic:
    """Every block gets one kept share, from the Fisher sensitivity S of its matrices and its outputs' effective rank R.

    `sign=paper` (the default: it is what the text argues for): `keep_l = Q_l / sum(Q) * L * ratio`, `Q = S^beta
    R^(1-beta)`, so blocks of *high* sensitivity and rank keep more. `sign=code` is what the official code computes, the
    *opposite* order: S is normalised inside four quarters of the depth and inverted, R standardised and negated, both
    are min-max scaled; `Q = S^beta R^(1-beta)` is mapped linearly to `ratio +- spread`, and that is rescaled to the
    budget within [0.3, 0.98]. That code takes R per batch of short sentences, and after the final norm in the last
    block; here it is taken over all calibration tokens, before the norm. Its beta was fitted to ratios found by search.
    R is the smallest number of the outputs' singular values (paper, code), or of their squares (`effective_rank=
    energy`), that add up to the share `threshold` of all. A group of several layers takes the mean of its blocks'
    shares. `min_ratio` and `max_ratio` bound the shares; null is [0, 1] for the paper and [0.3, 0.98] for the code. A
    retain_ratio above `max_ratio` replaces it.
    DipSVD (2506.20353), section on global importance.
    """

    sign: str
    beta: float
    effective_rank: str
    threshold: float
    spread: float
    min_ratio: float | None
    max_ratio: float | None

    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.SENSITIVITY, Statistic.BLOCK_OUTPUTS})

    def __post_init__(self) -> None:
        check_choice("sign", self.sign, tuple(_BOUNDS))
        check_choice("effective_rank", self.effective_rank, _MEASURES)
        check_share(above=0.0, threshold=self.threshold)
        if not 0.0 <= self.beta <= 1.0:
            raise ConfigError(
                f"beta must be between 0 (effective rank alone) and 1 (sensitivity alone), got {self.beta}."
            )
        if not 0.0 <= self.spread <= 1.0:
            raise ConfigError(f"spread must be between 0 (uniform) and 1, got {self.spread}.")
        if not 0.0 <= self._bounds[0] < self._bounds[1] <= 1.0:
            raise ConfigError(
                f"min_ratio and max_ratio must satisfy 0 <= min_ratio < max_ratio <= 1, got {self._bounds[0]} and "
                f"{self._bounds[1]}."
            )

    @property
    def _bounds(self) -> tuple[float, float]:
        low, high = _BOUNDS[self.sign]
        return (low if self.min_ratio is None else self.min_ratio, high if self.max_ratio is None else self.max_ratio)

    def check(self, groups: tuple[WeightGroup, ...], retain_ratio: float, layout: Layout) -> None:
        check_affordable(groups, retain_ratio, layout, lowest=self._bounds[0])

    def allocate(self, problem: AllocationProblem) -> RankPlan:
        """Ranks that spend the budget up to less than one component.

        Raises ConfigError if one component per group, or min_ratio, already exceeds the budget.
        """
        self.check(tuple(s.group for s in problem.spectra), problem.retain_ratio, problem.layout)
        layers = sorted({layer for s in problem.spectra for layer in s.group.blocks})
        shares = self.shares(problem.profile, layers, problem.retain_ratio)
        by_layer = dict(zip(layers, shares.tolist(), strict=True))
        low, high = self._bounds
        wanted = [mean_over_layers(s.group, by_layer) for s in problem.spectra]
        return make_plan(problem, share_out(problem, wanted, lowest=low, highest=high))

    def shares(self, profile: LayerProfile | None, layers: list[int], ratio: float) -> Float[Tensor, " layers"]:
        """The share that each block should keep, in fp64, before shares are clipped and fitted to the budget.

        Raises ValueError if the profile lacks the statistics, ConfigError if `sign=code` meets a sensitivity of 0.
        """
        if profile is None or profile.sensitivity is None or profile.output_singular_values is None:
            raise ValueError("DipSvdHeuristic needs sensitivities and block outputs; it says so in `needs`.")
        sensitivity = profile.sensitivity[layers].double()
        ranks = torch.tensor(
            [self.rank_of(profile.output_singular_values[layer]) for layer in layers], dtype=torch.float64
        )
        if self.sign == "paper":
            return paper_shares(sensitivity, ranks, beta=self.beta, ratio=ratio)
        return code_shares(sensitivity, ranks, beta=self.beta, spread=self.spread, ratio=ratio)

    def rank_of(self, singular_values: Float[Tensor, " d"]) -> int:
        """The smallest number of singular values, the largest first, that reach the threshold."""
        weights = singular_values.double()
        if self.effective_rank == "energy":
            weights = weights.square()
        cumulative = weights.cumsum(0) / weights.sum()
        return 1 + int(torch.searchsorted(cumulative, self.threshold).clamp_max(len(weights) - 1))


def paper_shares(sensitivity: Tensor, ranks: Tensor, *, beta: float, ratio: float) -> Tensor:
    """`Q_l / sum(Q) * L * ratio` with `Q = S^beta R^(1-beta)`."""
    quality = sensitivity.pow(beta) * ranks.pow(1.0 - beta)
    total = float(quality.sum())
    return quality / total * len(quality) * ratio if total else torch.full_like(quality, ratio)


def code_shares(sensitivity: Tensor, ranks: Tensor, *, beta: float, spread: float, ratio: float) -> Tensor:
    """The official code's shares, before clipping: high where S is low in its quarter of the depth and R is low."""
    deviation = ranks.mean() - ranks
    flatness = deviation / deviation.square().mean().sqrt() if bool(deviation.any()) else deviation
    quality = _min_max(1.0 / _by_quarter(sensitivity)).pow(beta) * _min_max(flatness).pow(1.0 - beta)
    span = float(quality.max() - quality.min())
    position = (quality - quality.min()) / span if span else torch.full_like(quality, 0.5)
    # A share below 0 means: keep nothing.
    return (ratio + spread * (2.0 * position - 1.0)).clamp_min(0.0)


def _by_quarter(values: Tensor) -> Tensor:
    """Each value as a share of its quarter of the depth."""
    if bool((values <= 0.0).any()):
        raise ConfigError(
            f"allocation.sign=code inverts the blocks' sensitivity, and that of layer {int(values.argmin())} is 0. "
            "Use allocation.sign=paper."
        )
    cuts = [len(values) * quarter // 4 for quarter in range(5)]
    parts = [values[start:stop] for start, stop in pairwise(cuts)]
    return torch.cat([part / part.sum() for part in parts])


def _min_max(values: Tensor) -> Tensor:
    """Scaled to [0, 1]. The smallest stays just above 0, as in the official code, so that no product is 0."""
    span = float(values.max() - values.min())
    return (values - values.min() + 1e-5) / span if span else torch.ones_like(values)
