"""Optuna studies: what a study is about, and one that several processes work on, at once or one after the other."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, BruteForceSampler, GridSampler
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from bs_exp.errors import BsExpError
from bs_exp.search.workers import Worker

# Attributes of a trial.
WORKER = "worker"
FOLDER = "folder"
ERROR = "error"
OVERRIDES = "overrides"
METRICS = "metrics"  # names of its values
REPEATS = "repeats"  # the number of the trial whose point it runs again
_CHECKSUM = "crc32"  # of what the trial says, as it ended; see _checksum
_DROPPED = "dropped"  # why it is no point of the search: its process ended
# Attributes of the study.
_IDENTITY = "identity"
_ALIVE = "alive:"
_JOBS = "jobs"  # the number of the next job

_SHOWN = 12


@dataclass(frozen=True)
class Identity:
    """What the study of a search is about. Trials of two studies that differ in it cannot be compared."""

    directions: tuple[str, ...]
    objectives: tuple[str, ...]
    parameters: Mapping[str, str]
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How errors name a study, who should have made it, this search, and the remedy; and the type of the errors."""

    study: str
    maker: str
    here: str
    remedy: str
    error: type[BsExpError]


def differences(stored: Mapping[str, Any], ours: Mapping[str, Any], here: str = "now") -> list[str]:
    """What differs between a stored identity and ours, as `KEY: VALUE in the study, VALUE now`; the first dozen."""
    theirs, own = _flat(stored), _flat(ours)
    keys = [key for key in dict.fromkeys([*theirs, *own]) if theirs.get(key) != own.get(key)]
    lines = [f"{key[1]}: {theirs.get(key, 'absent')} in the study, {own.get(key, 'absent')} {here}" for key in keys]
    return [*lines[:_SHOWN], *([f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])]


def _flat(identity: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """An identity by kind and key: a setting of one may be a parameter of another. Tuples become lists, as stored."""
    flat: dict[tuple[str, str], Any] = {}
    for kind, value in identity.items():
        entries = value if kind in ("parameters", "settings") else {kind: value}
        flat |= {(kind, key): list(v) if isinstance(v, tuple) else v for key, v in entries.items()}
    return flat


def find_study(name: str, storage: BaseStorage) -> optuna.Study | None:
    """The study of this name; None if there is none."""
    names = {study.study_name for study in storage.get_all_studies()}
    return optuna.load_study(study_name=name, storage=storage) if name in names else None


def check_identity(study: optuna.Study, identity: Mapping[str, Any], wording: Wording) -> None:
    """The wording's error, if the trials of a study cannot be compared with those of this search."""
    stored = study.user_attrs.get(_IDENTITY)
    if stored is None and study.get_trials(deepcopy=False):
        raise wording.error(
            f"{wording.study} was not made by {wording.maker}: nothing says what its trials mean. {wording.remedy}"
        )
    if stored is not None and (different := differences(stored, identity, wording.here)):
        lines = "\n  ".join(different)
        raise wording.error(
            f"{wording.study} belongs to another search; its trials do not compare. What differs:\n  {lines}\n"
            f"Set these as they were to go on with it. {wording.remedy}"
        )


def open_study(
    name: str,
    storage: BaseStorage,
    identity: Mapping[str, Any],
    wording: Wording,
    directions: Sequence[str],
    sampler: BaseSampler,
    pruner: BasePruner | None = None,
) -> tuple[optuna.Study, bool]:
    """The study of this name, made if it does not exist, and whether it was there before.

    Raises the wording's error if the stored one is about something else, or damaged.
    """
    with parsing(wording):
        study = find_study(name, storage) or optuna.create_study(
            study_name=name, storage=storage, directions=as_optuna(directions), load_if_exists=True
        )
        study.sampler, study.pruner = sampler, pruner or NopPruner()
        check_identity(study, identity, wording)
        was_there = _IDENTITY in study.user_attrs
        _check_trials(study.get_trials(deepcopy=False), wording)
    if not was_there:
        study.set_user_attr(_IDENTITY, dict(identity))
    return study, was_there


@contextmanager
def parsing(wording: Wording) -> Iterator[None]:
    """Turns what Optuna raises for stored texts and numbers that it cannot read into the wording's error."""
    try:
        yield
    except BsExpError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise wording.error(f"{wording.study} is damaged ({error!r}). {wording.remedy}") from error


def seal(study: optuna.Study, trial: Trial, values: Sequence[float] | None) -> None:
    """Stores the checksum of a trial, whose attributes are there, with the values that it is about to end with."""
    stored = study.get_trials(deepcopy=False)[trial.number]
    trial.set_user_attr(_CHECKSUM, _checksum(stored, values))


def _check_trials(trials: Sequence[FrozenTrial], wording: Wording) -> None:
    """The wording's error unless all trials are there, and those that have ended here say what they said then.

    Journals have checksums for every line; databases have none.
    """
    for number, trial in enumerate(trials):
        if trial.number != number:
            raise wording.error(f"{wording.study} is damaged: trial {number} is missing. {wording.remedy}")
        if WORKER in trial.user_attrs:
            Worker(**trial.user_attrs[WORKER])
        # A dropped one was told to fail after it had been sealed.
        stored = None if _DROPPED in trial.user_attrs else trial.user_attrs.get(_CHECKSUM)
        if trial.state.is_finished() and stored not in (None, _checksum(trial, trial.values)):
            raise wording.error(
                f"{wording.study} is damaged: trial {number} is not what was stored, its checksum differs. "
                f"{wording.remedy}"
            )


def _checksum(trial: FrozenTrial, values: Sequence[float] | None) -> str:
    """CRC-32 of a trial: number, parameters and their ranges, attributes, and the values that it ends with."""
    attributes = {key: value for key, value in trial.user_attrs.items() if key != _CHECKSUM}
    ranges = {name: distribution_to_json(found) for name, found in trial.distributions.items()}
    said = [
        trial.number,
        trial.params,
        ranges,
        attributes,
        None if values is None else [float(value) for value in values],
    ]
    return f"{zlib.crc32(json.dumps(said, sort_keys=True).encode()):08x}"


@dataclass(frozen=True)
class Claim:
    """Trials that a process has to run, as jobs from a number on; and the trials whose points are run again."""

    trials: Sequence[Trial]
    first_job: int
    repeated: Sequence[int]


class SharedStudy:
    """The study of a search, its budget of `n_trials`, and which process runs which trial.

    A trial counts once it has begun, failed ones too. One whose process ended is dropped, and a new trial repeats its
    point. `exclusive` excludes all other processes on the study: a trial is proposed and signed inside of it, so an
    unsigned one that is found there was begun by a process that has ended.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: BaseStorage,
        exclusive: Callable[[], AbstractContextManager[None]],
        space: Mapping[str, BaseDistribution],
        n_trials: int,
    ) -> None:
        self.study = study
        self.n_trials = n_trials
        self._storage = storage
        self._exclusive = exclusive
        self._space = dict(space)
        self._worker = Worker.this()
        self._points = _count_points(study.sampler, space)

    def beat(self, now: float) -> None:
        """Stores a heartbeat of this process, for processes on other hosts."""
        self.study.set_user_attr(_ALIVE + self._worker.name, now)

    def counted(self) -> list[FrozenTrial]:
        """The trials that are points of the search, by number; those that wait to be run too."""
        trials = self.study.get_trials(deepcopy=False)
        return sorted((t for t in trials if _DROPPED not in t.user_attrs), key=lambda trial: trial.number)

    @property
    def finished(self) -> int:
        """How many points have ended."""
        return sum(trial.state.is_finished() for trial in self.counted())

    def is_exhausted(self) -> bool:
        """Whether every point of a finite space, under a sampler that enumerates it, is tried or under way."""
        counted = self.counted()
        waiting = any(trial.state is TrialState.WAITING for trial in counted)
        return not waiting and len({tuple(sorted(trial.params.items())) for trial in counted}) >= self._points

    def claim(self, count: int) -> Claim:
        """At most `count` trials for this process, as the budget allows; none when the search is over.

        Points of processes that have ended come first.
        """
        with self._exclusive():
            repeated = self._release_abandoned()
            trials: list[Trial] = []
            while len(trials) < count and self._begun() < self.n_trials and not self.is_exhausted():
                trial = self.study.ask(self._space)
                trial.set_user_attr(WORKER, asdict(self._worker))
                trials.append(trial)
            # Trials of a batch may have gaps in their numbers, jobs have none; no job gets the folder of another.
            first = max(self.study.user_attrs.get(_JOBS, 0), trials[0].number) if trials else 0
            if trials:
                self.study.set_user_attr(_JOBS, first + len(trials))
        return Claim(trials, first, repeated)

    def end(self, trial: Trial, values: Sequence[float] | None, **attributes: Any) -> bool:
        """Stores what a trial found, None if it failed; False if another process has given the trial up."""
        with self._exclusive():
            if self._is_finished(trial.number):
                return False
            for name, value in attributes.items():
                trial.set_user_attr(name, value)
            seal(self.study, trial, values)
            self._tell(trial.number, values)
        return True

    def give_back(self, trials: Iterable[Trial]) -> None:
        """Drops unfinished trials of this process; their points are run again."""
        with self._exclusive():
            for trial in trials:
                self._drop(trial.number, "its process was stopped")

    def _begun(self) -> int:
        return sum(trial.state is not TrialState.WAITING for trial in self.counted())

    def _release_abandoned(self) -> list[int]:
        """Makes the points of processes that have ended wait to be run again; the numbers of their trials."""
        beats, now = self.study.user_attrs, time.time()
        abandoned = []
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            signature = trial.user_attrs.get(WORKER)
            if signature is None:
                # Some of its parameters may be missing: who takes it from the queue adds them.
                self._storage.set_trial_state_values(self._trial_id(trial.number), TrialState.WAITING)
            elif (worker := Worker(**signature)).is_gone(beats.get(_ALIVE + worker.name), now):
                self._drop(trial.number, "its process ended")
            else:
                continue
            abandoned.append(trial.number)
        return abandoned

    def _drop(self, number: int, reason: str) -> None:
        """Drops a running trial and has its point repeated. May be cut off anywhere, and done again."""
        trial = self._storage.get_trial(self._trial_id(number))
        if trial.state.is_finished():
            return
        if all(other.user_attrs.get(REPEATS) != number for other in self.study.get_trials(deepcopy=False)):
            self.study.add_trial(
                create_trial(
                    state=TrialState.WAITING,
                    params=trial.params,
                    distributions=trial.distributions,
                    user_attrs={REPEATS: number},
                    system_attrs=trial.system_attrs,  # samplers keep there what they know of the point
                )
            )
        self._storage.set_trial_user_attr(self._trial_id(number), _DROPPED, reason)
        self._tell(number, None)

    def _tell(self, number: int, values: Sequence[float] | None) -> None:
        try:
            self.study.tell(number, values, TrialState.FAIL if values is None else TrialState.COMPLETE)
        except RuntimeError:
            # Samplers that enumerate call Study.stop() after the last point, which is an error outside of
            # Study.optimize; the trial is told all the same.
            if not self._is_finished(number):
                raise

    def _is_finished(self, number: int) -> bool:
        return self._storage.get_trial(self._trial_id(number)).state.is_finished()

    def _trial_id(self, number: int) -> int:
        study_id = self._storage.get_study_id_from_name(self.study.study_name)
        return self._storage.get_trial_id_from_study_id_trial_number(study_id, number)


def as_optuna(directions: Iterable[str]) -> list[StudyDirection]:
    """Directions by Optuna's own names."""
    return [StudyDirection[direction.upper()] for direction in directions]


def _count_points(sampler: BaseSampler, space: Mapping[str, BaseDistribution]) -> float:
    """How many points a sampler enumerates; infinitely many if it does not."""
    if isinstance(sampler, GridSampler):
        return len(sampler._all_grids)
    if not isinstance(sampler, BruteForceSampler):
        return math.inf
    size = 1.0
    for distribution in space.values():
        match distribution:
            case CategoricalDistribution(choices=choices):
                size *= len(choices)
            case IntDistribution(low=low, high=high, step=step) | FloatDistribution(low=low, high=high, step=step):
                size *= math.inf if step is None else 1 + round((high - low) / step)
    return size
