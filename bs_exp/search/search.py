"""The loop of a search: claim points, run them, tell what they gave, until the budget is spent."""

from __future__ import annotations

import copy
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.samplers import BaseSampler
from optuna.trial import Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from bs_exp.errors import ConfigError, SearchError
from bs_exp.records.sweep import duration
from bs_exp.search.drawing import draw
from bs_exp.search.folder import locked, signed
from bs_exp.search.results import Results, collect, save
from bs_exp.search.space import SearchSpace, Value
from bs_exp.search.storage import open_storage, reason, shown
from bs_exp.search.study import FOLDER, METRICS, OVERRIDES, Identity, SharedStudy, as_optuna, open_study
from bs_exp.search.table import print_results
from bs_exp.search.workers import Heartbeat
from bs_exp.validation import check_at_least

_DIRECTIONS = ("minimize", "maximize")


@dataclass(frozen=True)
class Outcome:
    """What became of one point: its values, or why there are none; and where it ran."""

    values: tuple[float, ...] = ()
    error: str | None = None
    folder: str | None = None
    overrides: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # the metrics that the values belong to, as the run's record has them


# Runs points, given by their parameters, as jobs from a number on; an outcome for each.
Run = Callable[[Sequence[Mapping[str, Value]], int], Sequence[Outcome]]


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How long a search goes on, what it is after, and where its study lies."""

    n_trials: int
    n_jobs: int
    directions: tuple[str, ...]
    storage: str | None
    study_name: str
    max_failure_rate: float

    def __post_init__(self) -> None:
        check_at_least(1, n_trials=self.n_trials, n_jobs=self.n_jobs)
        if not self.directions or not set(self.directions) <= set(_DIRECTIONS):
            raise ConfigError(
                f"direction must be minimize or maximize, or a list of these, got {list(self.directions)}."
            )
        if not 0.0 <= self.max_failure_rate <= 1.0:
            raise ConfigError(
                f"max_failure_rate must be between 0 (stop at the first failure) and 1 (never), got "
                f"{self.max_failure_rate}."
            )
        if not self.study_name:
            raise ConfigError("study_name is empty: give the study a name.")

    @property
    def failures(self) -> int:
        """Failed trials of one process that are put up with."""
        return int(self.max_failure_rate * self.n_trials)


@dataclass(frozen=True)
class Ended:
    """What the study holds at the end of a search, and the errors of the trials that failed in this process."""

    results: Results
    failures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search as one process takes part in it."""

    settings: SearchSettings
    space: SearchSpace
    identity: Identity
    sampler: BaseSampler
    folder: Path

    def run(self, run: Run) -> Ended:
        """Runs trials until the study has `n_trials`, and saves what the study knows after every batch.

        Raises SearchError if the study or the folder belongs to another search, or the storage is lost on the way;
        ConfigError if the sampler cannot search the space.
        """
        settings = self.settings
        try_out(self.sampler, self.space, settings.directions)
        place = shown(settings.storage)
        with signed(self.folder, study=settings.study_name, storage=settings.storage, identity=self.identity):
            storage = open_storage(settings.storage, setting="hydra.sweeper.storage")
            raw, was_there = open_study(settings.study_name, storage, place, self.identity, self.sampler)
        study = SharedStudy(raw, storage, self.space.distributions, settings.n_trials)
        try:
            with ignoring_experimental(), Heartbeat(study.beat):
                self._report_start(study, was_there, place)
                failures = self._work(study, run)
            if study.exhausted:
                say(f"Every combination was tried, before n_trials={settings.n_trials}.")
            if elsewhere := sum(trial.state is TrialState.RUNNING for trial in study.counted()):
                say(
                    f"note: under way elsewhere, of {settings.n_trials} trials: {elsewhere}. The same "
                    "command runs those again whose process has ended."
                )
            return Ended(self._save(study), tuple(failures))
        except (StorageInternalError, SQLAlchemyError) as error:
            raise SearchError(
                f"The study in {place} does not answer any more: {reason(error)}. Its trials are kept, and points that "
                "ended have their records: the same command goes on."
            ) from error

    def conclude(self, ended: Ended) -> None:
        """Draws and prints what was found; SearchError if too many trials failed here, or none is completed."""
        settings, results = self.settings, ended.results
        places: list[tuple[str, Path | str]] = [("tables", self.folder), ("study", shown(settings.storage))]
        places += [("figure", path) for path in draw(results, self.folder) if path.suffix == ".png"]
        print_results(results, [*places, ("report", f"bs-exp report {self.folder}")])
        if len(ended.failures) > settings.failures:
            raise SearchError(
                f"{len(ended.failures)} trials failed, more than hydra.sweeper.max_failure_rate="
                f"{settings.max_failure_rate} of {settings.n_trials} allows. The last one: {ended.failures[-1]}"
            )
        if not results.completed:
            raise SearchError(f"No trial of study {settings.study_name!r} was completed; see {self.folder}.")

    def _work(self, study: SharedStudy, run: Run) -> list[str]:
        """The errors of the trials that failed here."""
        clock, failures, job = _Clock(study), list[str](), 0
        while len(failures) <= self.settings.failures:
            for number in study.adopt():
                say(f"trial {number}: its process ended before it did; its point is run again.")
            trials = study.claim(self.settings.n_jobs)
            if not trials:
                break
            # Trials of a batch may have gaps in their numbers, jobs have none; no job takes the folder of another.
            job = max(job, trials[0].number)
            try:
                outcomes = [self._check(outcome) for outcome in run([trial.params for trial in trials], job)]
            except BaseException:
                study.give_back(trials)
                raise
            job += len(trials)
            for trial, outcome in zip(trials, outcomes, strict=True):
                self._tell(study, trial, outcome, failures)
            results = self._save(study)
            say(clock.line(trials, outcomes, results))
        return failures

    def _check(self, outcome: Outcome) -> Outcome:
        """The outcome; with an error, if its values cannot be told."""
        values, directions = outcome.values, self.settings.directions
        if outcome.error is not None:
            return outcome
        if len(values) != len(directions):
            error = f"the run returned {len(values)} objectives, direction asks for {len(directions)}"
            return replace(outcome, error=error)
        if any(math.isnan(value) for value in values):
            return replace(outcome, error=f"an objective is not a number: {list(values)}")
        return outcome

    def _tell(self, study: SharedStudy, trial: Trial, outcome: Outcome, failures: list[str]) -> None:
        facts = {OVERRIDES: list(outcome.overrides), FOLDER: outcome.folder, METRICS: list(outcome.names)}
        if outcome.error is None:
            told = study.complete(trial, outcome.values, **facts)
        else:
            told = study.fail(trial, outcome.error, **facts)
            failures.append(outcome.error)
        if not told:
            say(f"trial {trial.number} was given up by another process; its result stays in its record alone.")

    def _save(self, study: SharedStudy) -> Results:
        # Read and written in one: another process must not write over tables that know more.
        with locked(self.folder):
            results = collect(study.study, study.counted(), self.identity.objectives)
            save(results, self.folder)
        return results

    def _report_start(self, study: SharedStudy, was_there: bool, place: str) -> None:
        done = sum(trial.state.is_finished() for trial in study.counted())
        say(
            f"study {self.settings.study_name} in {place}: "
            + (f"goes on, {done} of {self.settings.n_trials} trials done" if was_there else f"{study.n_trials} trials")
            + f"; {len(self.space.distributions)} parameters, {type(self.sampler).__name__}"
        )


class _Clock:
    """Measures how fast a study goes on, whoever works on it."""

    def __init__(self, study: SharedStudy) -> None:
        self._study = study
        self._start = time.monotonic()
        self._done = self._finished()

    def _finished(self) -> int:
        return sum(trial.state.is_finished() for trial in self._study.counted())

    def line(self, trials: Sequence[Trial], outcomes: Sequence[Outcome], results: Results) -> str:
        """One line on a batch: what it gave, the best so far, how many are left and for how long."""
        finished = self._finished()
        left = max(0, self._study.n_trials - finished)
        pace = (time.monotonic() - self._start) / max(1, finished - self._done)
        found = ", ".join(
            f"trial {trial.number}: {'failed' if outcome.error else _values(results, outcome.values)}"
            for trial, outcome in zip(trials, outcomes, strict=True)
        )
        best = ""
        if results.best:
            best = f", front of {len(results.best)}" if results.is_front else f", best {results.best[0].values[0]:.5g}"
        rest = f"{left} left, about {duration(left * pace)}" if left else "none left"
        return f"[{finished}/{self._study.n_trials}] {found}{best}; {rest}"


def try_out(sampler: BaseSampler, space: SearchSpace, directions: Sequence[str]) -> None:
    """ConfigError if a sampler cannot search a space, found in a study that is thrown away."""
    with ignoring_experimental():
        study = optuna.create_study(directions=as_optuna(directions), sampler=copy.deepcopy(sampler))
        try:
            study.ask(dict(space.distributions))
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"hydra.sweeper.sampler: {type(sampler).__name__} cannot search this space: {str(error).rstrip('.')}. "
                "Take another one, such as hydra/sweeper/sampler=tpe."
            ) from error


def _values(results: Results, values: Sequence[float]) -> str:
    return " ".join(f"{name} {value:.5g}" for name, value in zip(results.objectives, values, strict=False))


def say(line: str) -> None:
    """One line on stderr, at once: stdout holds the results alone."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def ignoring_experimental() -> Iterator[None]:
    """Optuna marks samplers as experimental that it has had for years; who chose one knows it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
