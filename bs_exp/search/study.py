"""One Optuna study that several processes may work on, at once or one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.samplers import BaseSampler, BruteForceSampler, GridSampler
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from bs_exp.errors import SearchError
from bs_exp.search.workers import SILENCE, Worker

# Attributes of a trial.
WORKER = "worker"
FOLDER = "folder"
ERROR = "error"
OVERRIDES = "overrides"
METRICS = "metrics"  # names of its values
REPEATS = "repeats"  # the number of the trial that it stands in for
_DROPPED = "dropped"  # why it is no point of the search: its process ended, or n_trials was reached
# Attributes of the study.
_IDENTITY = "identity"
_ALIVE = "alive:"

_WAIT = 10.0
_SHOWN = 12


@dataclass(frozen=True)
class Identity:
    """What a study is about. Trials of two studies that differ in it cannot be compared."""

    directions: tuple[str, ...]
    objectives: tuple[str, ...]
    parameters: Mapping[str, str]
    settings: Mapping[str, Any]

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """What differs from a stored identity, one line each."""
        found = []
        for field, ours in asdict(self).items():
            theirs = stored.get(field)
            if isinstance(ours, dict):
                theirs = theirs or {}
                keys = dict.fromkeys([*theirs, *ours])
                found += [_difference(key, theirs, ours) for key in keys if theirs.get(key) != ours.get(key)]
            elif list(ours) != theirs:
                found.append(f"{field}: {theirs} in the study, {list(ours)} now")
        return found


def _difference(key: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    def show(values: Mapping[str, Any]) -> str:
        return str(values[key]) if key in values else "absent"

    return f"{key}: {show(theirs)} in the study, {show(ours)} now"


class SharedStudy:
    """The study of a search, its budget of `n_trials`, and who runs which trial.

    A trial counts once it has begun, failed ones too. One whose process ended is dropped, and its point waits to be run
    again. Every write that two processes may compete for is settled by the storage: the second finds it done.
    """

    def __init__(
        self, study: optuna.Study, storage: BaseStorage, space: Mapping[str, BaseDistribution], n_trials: int
    ) -> None:
        self.study = study
        self.n_trials = n_trials
        self.exhausted = False
        self._storage = storage
        self._id = storage.get_study_id_from_name(study.study_name)
        self._space = dict(space)
        self._worker = Worker.this()
        # These try every point once, and then begin again.
        self._points = _size(space) if isinstance(study.sampler, BruteForceSampler | GridSampler) else None

    def beat(self, now: float) -> None:
        """A sign of life for processes on other hosts."""
        self.study.set_user_attr(_ALIVE + self._worker.name, now)

    def counted(self) -> list[FrozenTrial]:
        """The trials that are points of the search, by number; those that wait to be run too."""
        trials = self.study.get_trials(deepcopy=False)
        return sorted((t for t in trials if _DROPPED not in t.user_attrs), key=lambda trial: trial.number)

    def claim(self, count: int) -> list[Trial]:
        """New trials for this process, at most so many, and as the budget allows: none when the search is over."""
        counted = self.counted()
        begun = sum(trial.state is not TrialState.WAITING for trial in counted)
        claimed: list[Trial] = []
        while len(claimed) < min(count, self.n_trials - begun) and not self.exhausted:
            if self._points is not None and _different(self.counted()) >= self._points and begun == len(counted):
                self.exhausted = True
                break
            trial = self.study.ask(self._space)
            trial.set_user_attr(WORKER, self._worker.to_dict())
            # Numbers are given one by one: of processes that ask for the last trial at once, the first gets it.
            if [t.number for t in self.counted()].index(trial.number) >= self.n_trials:
                trial.set_user_attr(_DROPPED, "n_trials was reached")
                self._finish(trial.number, TrialState.FAIL)
                break
            claimed.append(trial)
        return claimed

    def complete(self, trial: Trial, values: Sequence[float], **attributes: Any) -> bool:
        """Tells what a trial found; False if another process has given it up meanwhile."""
        return self._end(trial, TrialState.COMPLETE, values, attributes)

    def fail(self, trial: Trial, error: str, **attributes: Any) -> bool:
        """Tells that a trial failed; False if another process has given it up meanwhile."""
        return self._end(trial, TrialState.FAIL, None, {ERROR: error, **attributes})

    def give_back(self, trials: Iterable[Trial]) -> None:
        """Drops unfinished trials of this process; their points wait to be run again."""
        for trial in trials:
            self._drop(trial.number, "its process was stopped")

    def adopt(self) -> list[int]:
        """Drops the unfinished trials of processes that are gone, so that their points are run again; their numbers."""
        beats, now = self.study.user_attrs, time.time()
        adopted = []
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if WORKER in trial.user_attrs:
                worker = Worker.from_dict(trial.user_attrs[WORKER])
                gone = worker.is_gone(beats.get(_ALIVE + worker.name), now)
            else:  # its process has not signed it yet, or ended before it did
                begun = trial.datetime_start
                gone = begun is not None and now - begun.timestamp() > SILENCE
            if gone and self._drop(trial.number, "its process ended"):
                adopted.append(trial.number)
        return adopted

    def _end(
        self, trial: Trial, state: TrialState, values: Sequence[float] | None, attributes: Mapping[str, Any]
    ) -> bool:
        try:
            for name, value in attributes.items():
                trial.set_user_attr(name, value)
        except UpdateFinishedTrialError:
            return False
        return self._finish(trial.number, state, values)

    def _drop(self, number: int, reason: str) -> bool:
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
        try:
            self._storage.set_trial_user_attr(trial_id, _DROPPED, reason)
        except UpdateFinishedTrialError:
            return False
        if not self._finish(number, TrialState.FAIL):
            return False
        params = self._storage.get_trial(trial_id).params
        if params.keys() == self._space.keys():  # else it ended before it had a point
            self.study.enqueue_trial(params, user_attrs={REPEATS: number})
        return True

    def _finish(self, number: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Ends a running trial; False if it had been ended."""
        try:
            self.study.tell(number, values, state)
        except (RuntimeError, ValueError) as error:
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
            if not self._storage.get_trial(trial_id).state.is_finished():
                raise
            if isinstance(error, ValueError | UpdateFinishedTrialError):
                return False
            # Samplers that enumerate call Study.stop() after the last point; the trial is told all the same.
            self.exhausted = True
        return True


def listed(differences: Sequence[str]) -> str:
    """Differences below each other, as many as can be read."""
    more = [f"... and {len(differences) - _SHOWN} more"] if len(differences) > _SHOWN else []
    return "\n  ".join([*differences[:_SHOWN], *more])


def as_optuna(directions: Iterable[str]) -> list[StudyDirection]:
    """Directions by Optuna's own names."""
    return [StudyDirection[direction.upper()] for direction in directions]


def _size(space: Mapping[str, BaseDistribution]) -> int | None:
    """Points in a space; None for infinitely many."""
    size = 1
    for distribution in space.values():
        match distribution:
            case CategoricalDistribution(choices=choices):
                size *= len(choices)
            case IntDistribution(low=low, high=high, step=step) | FloatDistribution(low=low, high=high, step=step):
                if step is None:
                    return None
                size *= 1 + round((high - low) / step)
    return size


def _different(trials: Iterable[FrozenTrial]) -> int:
    return len({tuple(sorted(trial.params.items())) for trial in trials if trial.params})


def open_study(
    name: str, storage: BaseStorage, place: str, identity: Identity, sampler: BaseSampler
) -> tuple[optuna.Study, bool]:
    """The study of this name, and whether it was there before.

    Raises SearchError if the stored one is about something else.
    """
    try:
        study = optuna.load_study(study_name=name, storage=storage, sampler=sampler)
    except KeyError:
        try:
            directions = as_optuna(identity.directions)
            study = optuna.create_study(study_name=name, storage=storage, sampler=sampler, directions=directions)
            study.set_user_attr(_IDENTITY, asdict(identity))
            return study, False
        except DuplicatedStudyError:  # another process was faster
            study = optuna.load_study(study_name=name, storage=storage, sampler=sampler)
    # The process that made it signs it at once; if it was killed in between, this one does.
    end = time.monotonic() + _WAIT
    while (stored := study.user_attrs.get(_IDENTITY)) is None and time.monotonic() < end and not study.trials:
        time.sleep(0.05)
    if stored is None and study.trials:
        raise SearchError(
            f"Study {name!r} in {place} was not made by this program: nothing says what its trials mean. Give another "
            "hydra.sweeper.study_name or hydra.sweeper.storage."
        )
    if stored is None:
        study.set_user_attr(_IDENTITY, asdict(identity))
    elif different := identity.differences(stored):
        raise SearchError(
            f"Study {name!r} in {place} belongs to another search; its trials do not compare. What differs:\n  "
            f"{listed(different)}\nSet these as they were to go on with it, or begin a study of its own: "
            "hydra.sweeper.study_name=NEW."
        )
    # Its points would be those that the first process has drawn from the same seed.
    sampler.reseed_rng()
    return study, True
