"""The most important channels are amplified, by a factor computed from each group's own statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from bs_exp.errors import ConfigError
from bs_exp.importance.weighting import check_weighting, column_norms, factor_of, gram_of, top_weights, weighted
from bs_exp.types import GroupStatistics, Statistic
from bs_exp.validation import check_choice


@dataclass(frozen=True, kw_only=True)
class AdaptiveChannelImportance:
    """The top share `p` of the channels is amplified by the group's own factor, between `a_min` and `a_max`.

    `by` names the statistic that places the factor between the two, from 0 (a_min) to 1 (a_max):
    - `spectrum`: `1 - H / ln d`, with H the entropy of the Gram's d eigenvalues: how few directions hold the energy;
    - `kurtosis`: `1 - 3 / kurtosis`, not below 0, of the activations of all channels: how heavy their tails are, with
      Gaussian ones at 0;
    - `sensitivity`: `s / (1 + s)`, with s the Fisher sensitivity relative to the layers of the matrix type: how much
      the loss depends on these weights, with a layer like the others at 1/2. Calibration makes a backward pass for it.
    `a_max = None` is the default factor of the form; it, `form` and predicted losses are as in `ChannelImportance`.
    DipSVD (2506.20353), local importance, has one factor for all layers; adapting it is an extension of ours.
    """

    p: float
    a_min: float
    a_max: float | None
    by: str
    form: str

    def __post_init__(self) -> None:
        check_weighting(form=self.form, p=self.p, a_min=self.a_min, a_max=self.a_max)
        check_choice("by", self.by, tuple(_MEASURES))
        object.__setattr__(self, "a_max", factor_of(self.form, self.a_max))
        if self.a_min > factor_of(self.form, self.a_max):
            raise ConfigError(f"a_min must be at most a_max, which is {self.a_max}, got {self.a_min}.")

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Statistic.GRAM}) | _MEASURES[self.by][0]

    def factor(self, statistics: GroupStatistics) -> float:
        """The factor of a group, between `a_min` and `a_max`."""
        position = _MEASURES[self.by][1](statistics)
        return self.a_min + (factor_of(self.form, self.a_max) - self.a_min) * position

    def reweight(self, statistics: GroupStatistics) -> GroupStatistics:
        norms = column_norms(gram_of(statistics))
        return weighted(statistics, top_weights(norms, self.p, self.factor(statistics)), self.form)


def spectral_concentration(statistics: GroupStatistics) -> float:
    """0 where all directions of the inputs hold the same energy, 1 where one holds all of it."""
    values = torch.linalg.eigvalsh(gram_of(statistics)).clamp_min(0.0)
    if len(values) == 1 or float(values.sum()) <= 0.0:
        return 0.0
    entropy = float(torch.special.entr(values / values.sum()).sum())
    return min(max(1.0 - entropy / math.log(len(values)), 0.0), 1.0)


def tail_weight(statistics: GroupStatistics) -> float:
    """0 where activations have the tails of a Gaussian, or lighter ones; near 1 where few of them hold the energy."""
    if statistics.moments is None:
        raise ValueError("Importance by kurtosis needs input moments; it says so in `needs`.")
    square = float(gram_of(statistics).diagonal().mean()) / (statistics.tokens * statistics.group.size)
    fourth = float(statistics.moments.fourth.mean())
    return max(1.0 - 3.0 * square**2 / fourth, 0.0) if fourth > 0.0 else 0.0


def relative_sensitivity(statistics: GroupStatistics) -> float:
    """1/2 for a group as sensitive as its matrix type is on average; 0 and 1 for none and all of the sensitivity."""
    if statistics.weight_gradient is None:
        raise ValueError("Importance by sensitivity needs weight gradients; it says so in `needs`.")
    sensitivity = statistics.weight_gradient.sensitivity
    return sensitivity / (1.0 + sensitivity)


_Measure = Callable[[GroupStatistics], float]
_MEASURES: Mapping[str, tuple[frozenset[Statistic], _Measure]] = {
    "spectrum": (frozenset(), spectral_concentration),
    "kurtosis": (frozenset({Statistic.INPUT_MOMENTS}), tail_weight),
    "sensitivity": (frozenset({Statistic.WEIGHT_GRADIENT}), relative_sensitivity),
}
