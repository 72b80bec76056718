"""Components of all groups, dropped in the order of the first-order change of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import ClassVar

from bs_exp.protocols import AllocationProblem, Layout
from bs_exp.rank_budget import check_affordable, make_plan, parameter_budget
from bs_exp.types import RankPlan, Statistic, WeightGroup
from bs_exp.validation import check_choice

_ORDERS = ("zero_sum", "size")


@dataclass(frozen=True, kw_only=True)
class FirstOrder:
    """Drops components of all groups by how much the loss changes to first order without them.

    Dropping component i of `W = sum_i b_i c_i` changes the loss by `-b_i^T G c_i` to first order, with G the gradient
    of the loss: `-sigma_i u_i^T (S^-T G) v_i` in whitened terms. Inside a group components go in the order of their
    singular values, the smallest first. Of what the groups would drop next, the one that changes least goes first, with
    `order=size` by `|change|` alone. With `order=zero_sum` there are two heaps, by sign: while the running sum of the
    changes is above zero the next one is taken from those that lower it, and otherwise from the others. It ends when
    the budget is met, so less than one component is left over.

    `zero_sum`: ZS-SVD (2602.02848), its one-shot selection; use whitening=gram. `size`: the score `|g_i sigma_i|` of
    IO-SVD (2605.15626), which is this change in its two-sided metric too, and ZS-SVD's ablation. Differences from the
    papers: groups may be shared and layouts may be any; every group keeps one component; and parameters are counted as
    they are stored, without int8 remapping, so that a group at or above break-even stays dense, although what it would
    have dropped is in the running sum. ZS-SVD's correction (truncated weights moved along the gradient, and truncated
    again) is `update=gradient_correction`. Corrections of a group that has some (sharing=residual) are not in the
    first-order changes.
    """

    order: str

    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.LOSS_GRADIENT})

    def __post_init__(self) -> None:
        check_choice("order", self.order, _ORDERS)

    def check(self, groups: tuple[WeightGroup, ...], retain_ratio: float, layout: Layout) -> None:
        check_affordable(groups, retain_ratio, layout)

    def allocate(self, problem: AllocationProblem) -> RankPlan:
        """Ranks within the budget; what is left is less than the last component that was dropped.

        Raises ConfigError if one component per group already exceeds the budget.
        """
        groups = tuple(spectrum.group for spectrum in problem.spectra)
        self.check(groups, problem.retain_ratio, problem.layout)
        if problem.retain_ratio == 1.0:
            return make_plan(problem, [None] * len(groups))
        changes = []
        for spectrum in problem.spectra:
            if spectrum.first_order is None:
                raise ValueError("FirstOrder needs first-order changes in its spectra; it says so in `needs`.")
            changes.append([float(change) for change in spectrum.first_order])
        budget = parameter_budget(sum(group.parameters for group in groups), problem.retain_ratio)
        if self.order == "size":
            changes = [[abs(change) for change in by_component] for by_component in changes]
        ranks = zero_sum_ranks(groups, changes, budget, problem.layout)
        dense = [
            _stored(group, rank, problem.layout) == group.parameters for group, rank in zip(groups, ranks, strict=True)
        ]
        return make_plan(problem, [None if whole else rank for whole, rank in zip(dense, ranks, strict=True)])


def zero_sum_ranks(
    groups: Sequence[WeightGroup], changes: Sequence[Sequence[float]], budget: int, layout: Layout
) -> list[int]:
    """The components that every group still has when the stored parameters of all are within the budget.

    `changes` are those of the loss by group, from the component that is dropped last to the one that is dropped first.
    Changes of one sign are taken by size. A sum of exactly zero counts as not above it; of equal changes, that of the
    earlier group goes first. Every group keeps one component.
    """
    ranks = [len(by_component) for by_component in changes]
    stored = [group.parameters for group in groups]
    falls: list[tuple[float, int]] = []  # (|change|, group) of those whose next component lowers the loss
    rises: list[tuple[float, int]] = []

    def offer(index: int) -> None:
        if ranks[index] > 1:
            change = changes[index][ranks[index] - 1]
            heappush(falls if change < 0.0 else rises, (abs(change), index))

    for index in range(len(groups)):
        offer(index)
    total, cost = 0.0, sum(stored)
    while cost > budget and (falls or rises):
        heap = (falls or rises) if total > 0.0 else (rises or falls)
        _, index = heappop(heap)
        total += changes[index][ranks[index] - 1]
        ranks[index] -= 1
        now = _stored(groups[index], ranks[index], layout)
        cost += now - stored[index]
        stored[index] = now
        offer(index)
    return ranks


def _stored(group: WeightGroup, rank: int, layout: Layout) -> int:
    """Parameters of a group at a rank, or dense where that costs no more."""
    return group.parameters if rank >= group.full_rank else min(layout.parameters(group, rank), group.parameters)
