"""The loop of a search: claim points, run them, store what they gave, until the budget is spent."""

from __future__ import annotations

import copy
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.trial import Trial, TrialState

from bs_exp.errors import ConfigError, SearchError
from bs_exp.printable import printable
from bs_exp.records.sweep import duration
from bs_exp.search.drawing import draw
from bs_exp.search.folder import signed
from bs_exp.search.results import Results, collect, save
from bs_exp.search.space import SearchSpace, Value
from bs_exp.search.storage import answering, exclusive, locked, open_storage, shown
from bs_exp.search.study import ERROR, FOLDER, METRICS, OVERRIDES, Identity, SharedStudy, Wording, as_optuna, open_study
from bs_exp.search.table import print_results
from bs_exp.search.workers import heartbeat
from bs_exp.validation import check_at_least

_DIRECTIONS = ("minimize", "maximize")


@dataclass(frozen=True)
class TrialOutcome:
    """What one point gave: its values, or an error; and the folder and overrides of its run."""

    values: tuple[float, ...] = ()
    error: str | None = None
    folder: str | None = None
    overrides: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # the metrics that the values belong to, as the run's record has them


# Runs points, given by their parameters, as jobs from a number on; an outcome for each.
Run = Callable[[Sequence[Mapping[str, Value]], int], Sequence[TrialOutcome]]


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The budget of a search, the directions of its objectives, and where its study lies."""

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
        """How many trials may fail in one process before it stops."""
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
        with answering(settings.storage):
            with signed(self.folder, study=settings.study_name, storage=settings.storage, identity=self.identity):
                study, was_there = self._open(place)
            done = (
                f"goes on, {study.finished} of {study.n_trials} trials done"
                if was_there
                else f"{study.n_trials} trials"
            )
            kind = f"{len(self.space.distributions)} parameters, {type(self.sampler).__name__}"
            say(f"study {settings.study_name} in {place}: {done}; {kind}")
            with ignoring_experimental(), heartbeat(study.beat):
                failures = self._work(study, run)
            running = sum(trial.state is TrialState.RUNNING for trial in study.counted())
            if running:
                say(
                    f"note: under way elsewhere, of {settings.n_trials} trials: {running}. The same command runs those "
                    "again whose process has ended."
                )
            elif study.finished < study.n_trials and study.is_exhausted():
                say(f"Every combination was tried, before n_trials={settings.n_trials}.")
            return Ended(self._save(study), tuple(failures))

    def conclude(self, ended: Ended) -> None:
        """Draws and prints the results; SearchError if too many trials failed here, or none is completed."""
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

    def _open(self, place: str) -> tuple[SharedStudy, bool]:
        """The study, and whether it was there before."""
        settings = self.settings
        storage = open_storage(settings.storage, setting="hydra.sweeper.storage")
        alone = partial(exclusive, storage, settings.storage, self.folder)
        wording = Wording(
            study=f"Study {settings.study_name!r} in {place}",
            maker="this program",
            here="now",
            remedy="A study of its own: hydra.sweeper.study_name=NEW, or another hydra.sweeper.storage.",
            error=SearchError,
        )
        with alone():
            study, was_there = open_study(
                settings.study_name, storage, asdict(self.identity), wording, settings.directions, self.sampler
            )
        if was_there:  # its points would be those that the first process has drawn from the same seed
            self.sampler.reseed_rng()
        return SharedStudy(study, storage, alone, self.space.distributions, settings.n_trials), was_there

    def _work(self, study: SharedStudy, run: Run) -> list[str]:
        """The errors of the trials that failed here."""
        clock, failures = _Clock(study), list[str]()
        while len(failures) <= self.settings.failures:
            claim = study.claim(self.settings.n_jobs)
            for number in claim.repeated:
                say(f"trial {number}: its process ended before it did; its point is run again.")
            if not claim.trials:
                break
            try:
                points = [trial.params for trial in claim.trials]
                outcomes = [self._check(outcome) for outcome in run(points, claim.first_job)]
            except BaseException:
                study.give_back(claim.trials)
                raise
            for trial, outcome in zip(claim.trials, outcomes, strict=True):
                facts = {OVERRIDES: list(outcome.overrides), FOLDER: outcome.folder, METRICS: list(outcome.names)}
                if outcome.error is None:
                    told = study.end(trial, outcome.values, **facts)
                else:
                    told = study.end(trial, None, **facts, **{ERROR: outcome.error})
                    failures.append(outcome.error)
                if not told:
                    say(f"trial {trial.number} was given up by another process; its result stays in its record alone.")
            say(clock.line(claim.trials, outcomes, self._save(study)))
        return failures

    def _check(self, outcome: TrialOutcome) -> TrialOutcome:
        """The outcome; with an error, if its values cannot be stored."""
        values, expected = outcome.values, len(self.settings.directions)
        if outcome.error is None and len(values) != expected:
            return replace(outcome, error=f"the run returned {len(values)} objectives, direction asks for {expected}")
        if outcome.error is None and any(map(math.isnan, values)):
            return replace(outcome, error=f"an objective is not a number: {list(values)}")
        return outcome

    def _save(self, study: SharedStudy) -> Results:
        # Read and written under one lock: another process must not overwrite tables that know more.
        with locked(self.folder):
            results = collect(study.study, study.counted(), self.identity.objectives)
            save(results, self.folder)
        _name_metrics(study.study, results)
        return results


def _name_metrics(study: optuna.Study, results: Results) -> None:
    """Names the values of trials in the study, for Optuna's dashboard and plots, once a run has told the names."""
    names = list(results.objectives)
    if results.completed and study.metric_names != names and len(set(names)) == len(names):
        with ignoring_experimental():
            study.set_metric_names(names)


class _Clock:
    """Measures how fast all processes together get on with a study."""

    def __init__(self, study: SharedStudy) -> None:
        self._study = study
        self._start = time.monotonic()
        self._done = study.finished

    def line(self, trials: Sequence[Trial], outcomes: Sequence[TrialOutcome], results: Results) -> str:
        """One line on a batch: what it gave, the best so far, how many are left and for how long."""
        finished, wanted = self._study.finished, self._study.n_trials
        left = max(0, wanted - finished)
        pace = (time.monotonic() - self._start) / max(1, finished - self._done)
        found = ", ".join(
            f"trial {trial.number}: {'failed' if outcome.error else _values(results, outcome.values)}"
            for trial, outcome in zip(trials, outcomes, strict=True)
        )
        best = ""
        if results.best:
            best = f", front of {len(results.best)}" if results.is_front else f", best {results.best[0].values[0]:.5g}"
        rest = f"{left} left, about {duration(left * pace)}" if left else "none left"
        return f"[{finished}/{wanted}] {found}{best}; {rest}"


def try_out(sampler: BaseSampler, space: SearchSpace, directions: Sequence[str]) -> None:
    """ConfigError if a sampler cannot search a space; tried in a study in memory."""
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
    print(printable(line), file=sys.stderr, flush=True)


@contextmanager
def ignoring_experimental() -> Iterator[None]:
    """Silences Optuna's warnings about samplers that it has called experimental for years."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
