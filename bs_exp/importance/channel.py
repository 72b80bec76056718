"""The most important channels are amplified, by the same factor in all groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bs_exp.importance.weighting import check_weighting, column_norms, factor_of, gram_of, top_weights, weighted
from bs_exp.types import GroupStatistics, Statistic


@dataclass(frozen=True, kw_only=True)
class ChannelImportance:
    """The top share `p` of the input channels, by the norm of their column of the Gram G, is amplified by `a`.

    With D the diagonal matrix of a and 1, `form` says what replaces the Gram: `two_sided`, `D G D`, is the paper's;
    `one_sided`, `(G D^2 G)^(1/2)`, is what the official code computes, and the default. The same factor acts
    differently in the two: on uncorrelated channels `one_sided` with a equals `two_sided` with the root of a. So
    `a = None` is 30 (the official code's) for `one_sided`, and the root of 30 for `two_sided`. Predicted losses are
    errors in the re-weighted metric, not of the outputs.
    DipSVD (2506.20353), local importance; official code 920927/DipSVD, dipsvd.py.
    """

    p: float
    a: float | None
    form: str

    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.GRAM})

    def __post_init__(self) -> None:
        check_weighting(form=self.form, p=self.p, a=self.a)
        object.__setattr__(self, "a", factor_of(self.form, self.a))

    def reweight(self, statistics: GroupStatistics) -> GroupStatistics:
        norms = column_norms(gram_of(statistics))
        return weighted(statistics, top_weights(norms, self.p, factor_of(self.form, self.a)), self.form)
