"""A strategy that breaks what its protocol asks for is named, with what it breaks, before or where it would do harm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from bs_exp.cache import Cache
from bs_exp.contracts import check_members
from bs_exp.errors import ConfigError, ContractError
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress
from bs_exp.progress import Progress
from bs_exp.rank_budget import make_plan
from bs_exp.schedule.single import SingleRound
from bs_exp.selection.measured import MeasuredSelection
from bs_exp.sharing.none import NoSharing
from bs_exp.testing.models import Tokens, recipe
from bs_exp.types import (
    GroupStatistics,
    LoadedModel,
    LossUnit,
    Metric,
    RankPlan,
    Statistic,
    TokenWindows,
    WeightGroup,
)
from bs_exp.update.chain import UpdateChain
from bs_exp.update.none import NoUpdate
from bs_exp.whitening.gram import GramWhitening
from bs_exp.workspace import Workspace

OURS = recipe(NoUpdate())


def _compress(**strategies: Any) -> Any:
    changed = replace(OURS, **strategies)
    return compress(tiny_random(), changed, Workspace(Cache(None), Progress(quiet=True)))


@dataclass(frozen=True)
class Whitening:
    """Whitens by whatever it is given."""

    make: Callable[[GroupStatistics], Metric]

    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.GRAM})

    def metric(self, statistics: GroupStatistics) -> Metric:
        return self.make(statistics)


def _in_place(statistics: GroupStatistics) -> Metric:
    assert statistics.gram is not None
    return Metric(whitener=torch.linalg.cholesky(statistics.gram.add_(torch.eye(len(statistics.gram)))).mT)


def _identity(size: int, value: float = 1.0) -> torch.Tensor:
    root = torch.eye(size, dtype=torch.float64)
    root[0, 0] = value
    return root


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda s: Metric(whitener=_identity(s.group.d_in + 1)),
            r"whitener of \w+\[.*\] must be \d+ x \d+, got float64",
        ),
        (lambda s: Metric(whitener=_identity(s.group.d_in, float("nan"))), "whitener of .* holds NaN or infinite"),
        (lambda s: Metric(whitener=_identity(s.group.d_in, 0.0)), "whitener of .* is singular .*Add a ridge"),
        (
            lambda s: Metric(whitener=None, right={99: _identity(s.group.d_out)}),
            r"right must have the layers of .*\[99\]",
        ),
        (lambda s: Metric(whitener=None, unit="norm"), "unit must be a bs_exp.types.LossUnit, got 'norm'"),
    ],
)
def test_metrics_that_cannot_be_one(make: Callable[[GroupStatistics], Metric], message: str) -> None:
    with pytest.raises(
        ContractError, match=rf"test_contracts\.Whitening does not keep.*protocols\.Whitening\): {message}"
    ):
        _compress(whitening=Whitening(make))


def test_statistics_are_not_to_be_changed() -> None:
    with pytest.raises(
        ContractError, match=r"whitening .*test_contracts\.Whitening changes the Gram .* in place.*clone"
    ):
        _compress(whitening=Whitening(_in_place))


def test_any_root_will_do() -> None:
    def symmetric(statistics: GroupStatistics) -> Metric:
        assert statistics.gram is not None
        gram = statistics.gram
        values, vectors = torch.linalg.eigh(gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram)))
        return Metric(whitener=vectors * values.sqrt() @ vectors.mT, unit=LossUnit.OUTPUT_NORM)

    ours, found = _compress(whitening=GramWhitening(ridge=1e-6)), _compress(whitening=Whitening(symmetric))
    assert found.plan.predicted_loss == pytest.approx(ours.plan.predicted_loss, rel=1e-3)


@dataclass(frozen=True)
class Sharing(NoSharing):
    """Every matrix alone, and then whatever is done to these groups."""

    change: Callable[[tuple[WeightGroup, ...]], tuple[WeightGroup, ...]]

    def groups(self, problem: Any) -> tuple[WeightGroup, ...]:
        return self.change(super().groups(problem))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda groups: groups[1:], r"layers\.0\.\S+ is in no group"),
        (lambda groups: (*groups, groups[0]), r"layers\.0\.\S+ is in two groups"),
        (lambda groups: (replace(groups[0], layers=(77,)), *groups[1:]), "holds layer 77, where the model has no such"),
        (
            lambda groups: (replace(groups[0], layers=(1, 0)), *groups[1:]),
            r"layers of a group must rise, got \w+\[1,0\]",
        ),
        (lambda groups: (replace(groups[0], d_in=5), *groups[1:]), r"is 5 x \d+, and \S+ is \d+ x \d+"),
    ],
)
def test_every_matrix_is_in_one_group_of_its_shape(change: Any, message: str) -> None:
    with pytest.raises(ContractError, match=rf"sharing \S*Sharing does not keep.*{message}"):
        _compress(sharing=Sharing(change))


@dataclass(frozen=True)
class Allocation:
    """Half of every rank, and then whatever is done to the plan."""

    change: Callable[[RankPlan], RankPlan]

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def check(self, groups: Any, retain_ratio: float, layout: Any) -> None:
        pass

    def allocate(self, problem: Any) -> RankPlan:
        return self.change(make_plan(problem, [spectrum.group.full_rank // 8 for spectrum in problem.spectra]))


def _first(plan: RankPlan, **changes: Any) -> RankPlan:
    return replace(plan, groups=(replace(plan.groups[0], **changes), *plan.groups[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: replace(plan, groups=plan.groups[::-1]), "must hold the groups of its problem, in their order"),
        (lambda plan: _first(plan, rank=0), r"must be between 1 and \d+, or None \(dense\), got 0"),
        (lambda plan: _first(plan, parameters=3), r"at rank \d+ takes \d+ parameters in this layout, the plan says 3"),
        (lambda plan: replace(plan, requested_ratio=0.9), r"requested_ratio must be the problem's 0\.5, got 0\.9"),
        (
            lambda plan: replace(
                plan, groups=tuple(replace(g, rank=None, parameters=g.group.parameters) for g in plan.groups)
            ),
            r"keeps (\d+) of \1 parameters, above the share of 0\.5",
        ),
    ],
)
def test_plans_out_of_bounds(change: Any, message: str) -> None:
    with pytest.raises(ContractError, match=rf"allocation \S*Allocation does not keep.*{message}"):
        _compress(allocation=Allocation(change))


@pytest.mark.parametrize("ratio", [1.0, 0.4, float("nan")])
def test_rounds_that_would_not_end(ratio: float) -> None:
    class Standing(SingleRound):
        def next_ratio(self, current: float, target: float, loss_at: Any) -> float:
            return ratio

    with pytest.raises(
        ContractError, match=r"schedule \S*Standing .* at least the target, 0\.5, and below .*, 1\.0, got"
    ):
        _compress(schedule=Standing())


@dataclass(frozen=True)
class Update(NoUpdate):
    """Whatever is done to the compressed and the dense model."""

    change: Callable[[Any, LoadedModel], object]

    def apply(self, compressed: Any, dense: LoadedModel, *others: Any) -> Mapping[str, Any]:
        with torch.no_grad():
            self.change(compressed, dense)
        return {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda compressed, dense: compressed.model.norm.weight.mul_(2.0),
            "model.norm.weight of the dense model changed",
        ),
        (lambda compressed, dense: dense.module.lm_head.weight.add_(1.0), "of the dense model changed"),
        (
            lambda compressed, dense: compressed.register_buffer("mine", torch.ones(1)),
            "mine has another shape, or is new",
        ),
    ],
)
def test_updates_change_factors_alone(change: Any, message: str) -> None:
    with pytest.raises(ContractError, match=rf"update \S*Update does not keep.*{message}"):
        _compress(update=Update(change))


@dataclass(frozen=True)
class Windows(Tokens):
    """Whatever is made of random windows."""

    change: Callable[[TokenWindows], TokenWindows]

    def windows(self, tokenizer: object) -> TokenWindows:
        return self.change(super().windows(tokenizer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda windows: replace(windows, ids=windows.ids[0]),
            r"ids must be whole numbers \[windows, length\], got int64",
        ),
        (lambda windows: replace(windows, ids=windows.ids.float()), r"got float32 \[16, 24\]"),
        (lambda windows: replace(windows, provenance={}), "must hold the windows' hash under 'sha256'"),
    ],
)
def test_windows_that_are_none(change: Any, message: str) -> None:
    with pytest.raises(ContractError, match=rf"calibration \S*Windows does not keep.*{message}"):
        _compress(calibration=Windows(change=change))


class Nothing:
    """Lacks everything."""


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        ("whitening", "metric"),
        ("importance", "needs"),
        ("sharing", "check"),
        ("allocation", "allocate"),
        ("layout", "arrange"),
        ("schedule", "next_ratio"),
        ("update", "apply"),
        ("calibration", "batch_size"),
    ],
)
def test_what_is_missing_is_named_when_the_recipe_is_made(family: str, missing: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^{family}: \S*Nothing has no {missing}, which bs_exp\.protocols\.\w+ asks"
    ):
        replace(OURS, **{family: Nothing()})  # type: ignore[arg-type]


def test_what_is_missing_is_named_within_other_strategies_too() -> None:
    with pytest.raises(ConfigError, match="Nothing has no apply"):
        UpdateChain(updates={"mine": Nothing()})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="Nothing has no metric"):
        MeasuredSelection(
            candidates={"mine": {"whitening": Nothing()}},
            objective="kl",
            holdout=0.5,
            rounds="all",
            recalibrate=True,
            seed=0,
        )


@pytest.mark.parametrize("needs", [{"gram"}, frozenset({"gram!"}), None])
def test_needs_are_statistics(needs: Any) -> None:
    class Mine(GramWhitening):
        pass

    Mine.needs = needs
    with pytest.raises(ConfigError, match=r"Mine\.needs must be a frozenset of bs_exp\.types\.Statistic \(GRAM"):
        check_members("whitening", Mine(ridge=0.0))
