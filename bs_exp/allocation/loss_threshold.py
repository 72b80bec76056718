"""The smallest ranks whose predicted losses are below one threshold for all groups."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from bs_exp.errors import ConfigError
from bs_exp.protocols import AllocationProblem, Layout
from bs_exp.rank_budget import Choices, check_affordable, cost_of, make_plan, parameter_budget, spectrum_choices, spend
from bs_exp.types import RankPlan, Spectrum, Statistic, WeightGroup


@dataclass(frozen=True, kw_only=True)
class LossThreshold:
    """Every group gets the smallest rank whose predicted loss is at most `max_loss`.

    `max_loss: null` takes the smallest threshold that meets the budget, and spends what is left where a component saves
    most. A given threshold alone decides what is kept, and must not need more than `retain_ratio`. Losses are in the
    metric's unit (`||X dW||`, or nats per token); `relative` divides each by the loss of dropping the whole group,
    which makes matrix types comparable where the unit does not.
    It is the closed rank rule of truncated SVD: the dropped tail of the spectrum stays below a bound.
    """

    max_loss: float | None
    relative: bool

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __post_init__(self) -> None:
        if self.max_loss is not None and not self.max_loss > 0.0:
            raise ConfigError(
                f"max_loss must be above 0, or null for the one that meets the budget, got {self.max_loss}."
            )

        if self.relative and self.max_loss is not None and self.max_loss >= 1.0:
            raise ConfigError(
                f"max_loss must be below 1 with allocation.relative=true (a share of the whole), got {self.max_loss}."
            )

    def check(self, groups: tuple[WeightGroup, ...], retain_ratio: float, layout: Layout) -> None:
        check_affordable(groups, retain_ratio, layout)

    def allocate(self, problem: AllocationProblem) -> RankPlan:
        """Ranks within the budget; without a given threshold, less than one component below it.

        Raises ConfigError if the given threshold, or one component per group, needs more than the budget.
        """
        self.check(tuple(s.group for s in problem.spectra), problem.retain_ratio, problem.layout)
        total = sum(s.group.parameters for s in problem.spectra)
        budget = parameter_budget(total, problem.retain_ratio)
        choices = [self._choices(spectrum, problem.layout) for spectrum in problem.spectra]
        if self.max_loss is None:
            chosen = spend(choices, _at(choices, affordable_loss(choices, budget)), budget)
        else:
            chosen = _at(choices, self.max_loss)
            if (cost := cost_of(choices, chosen)) > budget:
                raise ConfigError(
                    f"allocation.max_loss={self.max_loss} keeps {cost / total:.4f} of the parameters, which is more "
                    f"than retain_ratio {problem.retain_ratio}. Raise retain_ratio, or allow a loss of "
                    f"{affordable_loss(choices, budget):.4g}, which meets it."
                )
        return make_plan(problem, [c.ranks[i] for c, i in zip(choices, chosen, strict=True)])

    def _choices(self, spectrum: Spectrum, layout: Layout) -> Choices:
        """The group's ranks with their losses in the unit of `max_loss`."""
        choices = spectrum_choices(spectrum, layout)
        losses = choices.losses if spectrum.unit.is_second_order else choices.losses.sqrt()
        whole = spectrum.loss(0) if self.relative else 1.0
        return Choices(choices.ranks, choices.costs, losses / whole if whole else losses)


def affordable_loss(choices: Sequence[Choices], budget: int) -> float:
    """The smallest threshold that the budget can meet; it is one of the choices' losses, since ranks are whole."""
    losses = torch.cat([c.losses for c in choices]).unique()
    # At the largest loss every group has its cheapest choice.
    others = range(len(losses) - 1)
    fits = bisect_left(others, True, key=lambda i: cost_of(choices, _at(choices, float(losses[i]))) <= budget)
    return float(losses[fits])


def _at(choices: Sequence[Choices], threshold: float) -> list[int]:
    """Index of every group's cheapest choice within the threshold; dense, which loses 0, always is within it."""
    return [int((c.losses <= threshold).int().argmax()) for c in choices]
