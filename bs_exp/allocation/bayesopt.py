"""Ranks by search: Optuna proposes kept shares, and the plans that they give are measured."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from bs_exp.cache import content_key
from bs_exp.contracts import check_members
from bs_exp.errors import CalibrationError, ConfigError
from bs_exp.identity import identity
from bs_exp.protocols import Allocation, AllocationProblem, Layout, PlanObjective, Score
from bs_exp.rank_budget import check_affordable, make_plan, share_out
from bs_exp.search.storage import answering, open_storage
from bs_exp.search.study import Wording, check_identity, find_study, open_study, parsing, seal
from bs_exp.types import RankPlan, Statistic, WeightGroup
from bs_exp.validation import check_at_least, check_choice, check_seed

_SAMPLERS = ("gp", "tpe", "cmaes")
_UNITS = ("block", "matrix")
_PRUNING = ("none", "median")
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
# Attributes of a trial: what its plan is known by, and which warm start it is.
_PLAN = "plan"
_START = "start"
# Proposals per trial: many points may mean one plan, which is measured once.
_PATIENCE = 2


@dataclass(frozen=True, kw_only=True)
class BayesianSearch:
    """Kept shares by block (or by group of matrices) that minimise a measured objective, searched for with Optuna.

    A trial proposes a number in [`min_ratio`, `max_ratio`] for every block; these are brought to the budget in
    proportion, clipped to the same bounds (`max_ratio` gives way to a larger retain_ratio), and the plan is measured. A
    group of several layers takes the mean of theirs; `unit=matrix` gives every group a number of its own. The plans of
    `warm_starts` are tried first. `sampler`: a Gaussian process with expected improvement, a tree-structured Parzen
    estimator, or CMA-ES; the first `startup_trials` are random. `pruning=median` ends a trial after a batch of windows
    if it does worse so far than half of the earlier ones; the Gaussian process does not learn from these.

    Every trial has a random stream of its own, so a search that was stopped goes on as if it had not been: `storage`
    holds the study (a journal file, or the URL of a database), and processes that share it share the trials. `trials`
    counts the different plans of all of them. A proposal that gives a known plan costs nothing; the search ends when
    there were `2 * trials` proposals.

    DipSVD (2506.20353), section on global importance: its paper compares outputs by their cosine, its official code by
    perplexity, over shares in (0.25, 1), with expected improvement and one uniform start.
    """

    trials: int
    sampler: str
    startup_trials: int
    unit: str
    objective: str
    num_windows: int | None
    pruning: str
    min_ratio: float
    max_ratio: float
    warm_starts: Mapping[str, Allocation]
    seed: int
    storage: str | None
    study_name: str | None

    def __post_init__(self) -> None:
        check_at_least(1, trials=self.trials)
        check_at_least(0, startup_trials=self.startup_trials)
        check_seed(self.seed)
        check_choice("sampler", self.sampler, _SAMPLERS)
        check_choice("unit", self.unit, _UNITS)
        check_choice("pruning", self.pruning, _PRUNING)
        PlanObjective(objective=self.objective, num_windows=self.num_windows)
        for start in self.warm_starts.values():
            check_members("allocation", start)
        if not 0.0 < self.min_ratio < self.max_ratio <= 1.0:
            raise ConfigError(
                f"min_ratio and max_ratio must satisfy 0 < min_ratio < max_ratio <= 1, got {self.min_ratio} and "
                f"{self.max_ratio}."
            )
        if self.storage is None and self.study_name is not None:
            raise ConfigError(
                f"study_name {self.study_name!r} names a study in a storage, but storage is null, which keeps nothing. "
                "Set allocation.storage to a file, or leave study_name null."
            )
        if self.sampler == "cmaes" and importlib.util.find_spec("cmaes") is None:
            raise ConfigError("sampler=cmaes needs the package cmaes: pip install cmaes, or use gp or tpe.")

    @property
    def needs(self) -> frozenset[Statistic]:
        """The statistics that the warm starts need."""
        return frozenset[Statistic]().union(*(start.needs for start in self.warm_starts.values()))

    @property
    def measured_by(self) -> PlanObjective:
        return PlanObjective(objective=self.objective, num_windows=self.num_windows)

    def check(self, groups: tuple[WeightGroup, ...], retain_ratio: float, layout: Layout) -> None:
        check_affordable(groups, retain_ratio, layout, lowest=self.min_ratio)
        for start in self.warm_starts.values():
            start.check(groups, retain_ratio, layout)

    def check_search(self, identity: Mapping[str, Any]) -> None:
        """ConfigError or SearchError if the storage cannot be opened, or has a study of this name of another search."""
        if self.storage is None:
            return
        storage = open_storage(self.storage, setting="allocation.storage")
        if self.study_name is None:
            return
        wording = _wording(self.study_name)
        with parsing(wording):
            if (study := find_study(self.study_name, storage)) is not None:
                check_identity(study, self._identity(identity), wording)

    def allocate(self, problem: AllocationProblem) -> RankPlan:
        """The best plan of the search; less than one component of the budget is left over.

        Raises ConfigError if min_ratio exceeds the budget or the study is about something else, CalibrationError if no
        plan has finite outputs, SearchError if the storage is lost on the way.
        """
        self.check(tuple(s.group for s in problem.spectra), problem.retain_ratio, problem.layout)
        if problem.retain_ratio == 1.0:
            return make_plan(problem, [None] * len(problem.spectra))
        if problem.score is None:
            raise ValueError("BayesianSearch measures plans, so its problem needs a score.")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with answering(self.storage):
            return self._best_plan(problem, problem.score)

    def _best_plan(self, problem: AllocationProblem, score: Score) -> RankPlan:
        space = _Space(problem=problem, by_matrix=self.unit == "matrix", low=self.min_ratio, high=self.max_ratio)
        plans = _Plans(space, {name: start.allocate(problem) for name, start in self.warm_starts.items()})
        study = self._open(score.identity)
        _enqueue(study, plans)
        found = self._search(study, plans, score)
        for _ in score.track(found, label=_Label(study), total=max(self.trials - _count_plans(study), 0)):
            pass  # the search runs as the bar asks for its next plan
        best = _best(study)
        if best is None:
            raise CalibrationError(
                f"None of the {len(study.trials)} plans that allocation=bayesopt tried gave finite outputs on the "
                "calibration windows. Raise retain_ratio, or load the model in another dtype (model.dtype=float32)."
            )
        return replace(plans.of(best), search=self._report(study, best))

    def _search(self, study: optuna.Study, plans: _Plans, score: Score) -> Iterator[int]:
        """Tries plans until the study has enough, and yields after each new one; other processes may try some."""
        while (count := _count_plans(study)) < self.trials and len(_ended(study)) < _PATIENCE * self.trials:
            self._try_one(study, plans, score)
            if _count_plans(study) > count:
                yield count

    def _try_one(self, study: optuna.Study, plans: _Plans, score: Score) -> None:
        trial = study.ask(plans.space.distributions)
        state, value = TrialState.FAIL, None  # unless it ends: then the point is free to be tried again
        try:
            plan = plans.of(trial)
            trial.set_user_attr(_PLAN, content_key(ranks=[planned.rank for planned in plan.groups]))
            for step, value in enumerate(score.running(plan)):
                if math.isfinite(value):
                    trial.report(value, step)
                if not math.isfinite(value) or trial.should_prune():
                    state = TrialState.PRUNED
                    break
            else:
                state = TrialState.COMPLETE
                seal(study, trial, None if value is None else [value])
        finally:
            study.tell(trial, value if state is TrialState.COMPLETE else None, state)

    def _sampler(self, number: int) -> BaseSampler:
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        match self.sampler:
            case "gp":
                return GPSampler(seed=seed, n_startup_trials=self.startup_trials, warn_independent_sampling=False)
            case "tpe":
                return TPESampler(seed=seed, n_startup_trials=self.startup_trials)
            case _:
                return CmaEsSampler(seed=seed, n_startup_trials=self.startup_trials, warn_independent_sampling=False)

    def _open(self, scores: Mapping[str, Any]) -> optuna.Study:
        identity = self._identity(scores)
        name = self.study_name or f"bs_exp-{content_key(**identity)[:16]}"
        if scores.get("kept", 1.0) != 1.0 and self.study_name:  # every round of a schedule is a search of its own
            name = f"{name}-after-{scores['kept']:g}"
        pruner = optuna.pruners.MedianPruner() if self.pruning == "median" else None
        storage = open_storage(self.storage, setting="allocation.storage")
        sampler = _SeededByTrial(self._sampler)
        return open_study(name, storage, identity, _wording(name), ("minimize",), sampler, pruner)[0]

    def _identity(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        """The settings and inputs that trials must have in common to be compared."""
        return {
            **scores,
            "objective": self.objective,
            "num_windows": self.num_windows,
            "unit": self.unit,
            "min_ratio": self.min_ratio,
            "max_ratio": self.max_ratio,
            "warm_starts": {name: identity(start) for name, start in self.warm_starts.items()},
        }

    def _report(self, study: optuna.Study, best: FrozenTrial) -> dict[str, Any]:
        trials = _ended(study)
        return {
            "strategy": "bayesopt",
            "sampler": self.sampler,
            "objective": self.objective,
            "best_value": best.value,
            "best_trial": best.number,
            "plans": _count_plans(study),
            "proposals": {state.name.lower(): sum(t.state is state for t in trials) for state in _ENDED},
            "warm_starts": {t.user_attrs[_START]: t.value for t in trials if _START in t.user_attrs},
            "shares": dict(best.params),
            "history": [[trial.number, trial.value] for trial in trials],
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class _Space:
    """Points with one number per block, or per group, and the conversion between points and plans."""

    problem: AllocationProblem
    by_matrix: bool
    low: float
    high: float

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        names = dict.fromkeys(name for spectrum in self.problem.spectra for name in self._names(spectrum.group))
        return {name: FloatDistribution(self.low, self.high) for name in names}

    def plan(self, point: Mapping[str, float]) -> RankPlan:
        """The plan within the budget whose shares are in proportion to the point, as far as the bounds allow."""
        wanted = [
            sum(point[name] for name in names) / len(names)
            for names in (self._names(spectrum.group) for spectrum in self.problem.spectra)
        ]
        return make_plan(self.problem, share_out(self.problem, wanted, lowest=self.low, highest=self.high))

    def point(self, plan: RankPlan) -> dict[str, float]:
        """The point nearest to a plan: what it keeps of each block, or group."""
        kept, whole = dict.fromkeys(self.distributions, 0.0), dict.fromkeys(self.distributions, 0.0)
        for planned in plan.groups:
            names = self._names(planned.group)
            for name in names:
                kept[name] += planned.parameters / len(names)
                whole[name] += planned.group.parameters / len(names)
        return {name: min(max(kept[name] / whole[name], self.low), self.high) for name in self.distributions}

    def _names(self, group: WeightGroup) -> Sequence[str]:
        return [group.name] if self.by_matrix else [f"layer {layer}" for layer in group.blocks]


@dataclass(frozen=True, eq=False)
class _Plans:
    """The plan of a trial: that of its warm start unchanged, or the one at its point."""

    space: _Space
    starts: Mapping[str, RankPlan]

    def of(self, trial: optuna.Trial | FrozenTrial) -> RankPlan:
        start = trial.user_attrs.get(_START)
        return self.space.plan(trial.params) if start is None else self.starts[start]


class _SeededByTrial(BaseSampler):
    """A new sampler for every trial, made from the trial's number among those that did not fail.

    What a sampler draws then depends on the study alone, not on who asked before.
    """

    def __init__(self, make: Callable[[int], BaseSampler]) -> None:
        self._make = make
        self._made: tuple[int, BaseSampler] | None = None

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._of(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(study, trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._of(study, trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._of(study, trial).before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._of(study, trial).after_trial(study, trial, state, values)

    def _of(self, study: optuna.Study, trial: FrozenTrial) -> BaseSampler:
        if self._made is None or self._made[0] != trial.number:
            failed = sum(t.state is TrialState.FAIL and t.number < trial.number for t in _trials(study))
            self._made = trial.number, self._make(trial.number - failed)
        return self._made[1]


@dataclass(frozen=True, eq=False)
class _Label:
    """The text of the progress bar."""

    study: optuna.Study

    def __call__(self) -> str:
        best = _best(self.study)
        return "searching" if best is None else f"searching, best {best.value:.4g}"


def _wording(study: str) -> Wording:
    return Wording(
        study=f"Study {study!r}",
        maker="allocation=bayesopt",
        here="here",
        remedy="Set another allocation.study_name, or null: then every search finds its own.",
        error=ConfigError,
    )


def _trials(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False)


def _ended(study: optuna.Study) -> list[FrozenTrial]:
    return [trial for trial in _trials(study) if trial.state in _ENDED]


def _count_plans(study: optuna.Study) -> int:
    """The number of different plans that were tried."""
    return len({trial.user_attrs[_PLAN] for trial in _ended(study)})


def _best(study: optuna.Study) -> FrozenTrial | None:
    """The trial of the lowest value; of equals the first."""
    complete = [trial for trial in _trials(study) if trial.state is TrialState.COMPLETE]
    return min(complete, key=lambda trial: (trial.value, trial.number), default=None)


def _enqueue(study: optuna.Study, plans: _Plans) -> None:
    """Enqueues the warm starts that no trial has ended with, or waits to try; also those whose process was killed."""
    known = {t.user_attrs.get(_START) for t in _trials(study) if t.state in (*_ENDED, TrialState.WAITING)}
    for name, plan in plans.starts.items():
        if name not in known:
            study.enqueue_trial(plans.space.point(plan), user_attrs={_START: name})
