"""Channels are amplified gradually, by how important they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.importance.weighting import check_weighting, column_norms, factor_of, gram_of, top_count, weighted
from bs_exp.types import GroupStatistics, Statistic
from bs_exp.validation import check_number


@dataclass(frozen=True, kw_only=True)
class SoftChannelImportance:
    """Channels weighted from 1 to `a`, by their importance: `1 + (a - 1) sigmoid((log alpha - t) / temperature)`.

    `alpha_j` is the norm of column j of the Gram, and t its logarithm where the top share `p` begins. So temperature
    is in units of log alpha: near 0 it gives the hard choice of `ChannelImportance`, and above the spread of log alpha
    all channels weigh alike. `a`, `form` and predicted losses are as in `ChannelImportance`.
    A continuous form of DipSVD (2506.20353), local importance; an extension of ours.
    """

    p: float
    a: float | None
    temperature: float
    form: str

    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.GRAM})

    def __post_init__(self) -> None:
        check_weighting(form=self.form, p=self.p, a=self.a)
        check_number(1e-6, temperature=self.temperature)
        object.__setattr__(self, "a", factor_of(self.form, self.a))

    def reweight(self, statistics: GroupStatistics) -> GroupStatistics:
        norms = column_norms(gram_of(statistics))
        shares = soft_top(norms, self.p, self.temperature)
        return weighted(statistics, 1.0 + (factor_of(self.form, self.a) - 1.0) * shares, self.form)


def soft_top(norms: Float[Tensor, " d"], p: float, temperature: float) -> Float[Tensor, " d"]:
    """Membership of each channel in the top share p, from 0 to 1.

    It is 1/2 midway, in log norm, between the last channel inside and the first one outside.
    """
    count = top_count(p, len(norms))
    if count == 0:
        return torch.zeros_like(norms)
    # Clamped: the logarithm of a channel that is always zero would make the threshold infinite.
    logs = norms.clamp_min(torch.finfo(norms.dtype).tiny).log()
    ordered = logs.sort(descending=True).values
    threshold = ordered[count - 1 : count + 1].mean()
    return torch.sigmoid((logs - threshold) / temperature)
