"""The Hydra side of a search: `hydra/sweeper=optuna`.

Hydra looks for plug-ins only in the namespace package `hydra_plugins`, and imports them at every start; so Optuna and
Matplotlib are imported when a search begins.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bs_exp.cli.config import check_root
from bs_exp.cli.explain import explain
from bs_exp.cli.setting_types import check_kind, wrong_settings
from bs_exp.errors import CacheError, ConfigError, RecordError
from bs_exp.records.metrics import lower_is_better
from bs_exp.records.record import read_record
from bs_exp.records.settings import result_settings
from bs_exp.records.sweep import objectives
from bs_exp.source_code import targets_code

if TYPE_CHECKING:
    from bs_exp.search.search import TrialOutcome
    from bs_exp.search.space import SearchSpace, Value
    from bs_exp.search.study import Identity


# What `check_root` looks at.
_ROOT_DIALS = {"name", "seed", "retain_ratio", "objective", "evaluation", "evaluation.parts"}


class OptunaSweeper(Sweeper):
    """Searches settings with Optuna. Options are named as in hydra-optuna-sweeper; conf/hydra/sweeper/optuna.yaml."""

    def __init__(
        self,
        *,
        n_trials: int,
        n_jobs: int,
        direction: str | Sequence[str],
        storage: str | None,
        study_name: str,
        sampler: DictConfig,
        max_failure_rate: float,
        params: DictConfig | None,
    ) -> None:
        from bs_exp.search.search import SearchSettings

        for name, value, hint in (
            ("n_trials", n_trials, int),
            ("n_jobs", n_jobs, int),
            ("direction", direction, str | Sequence[str]),
            ("storage", storage, str | None),
            ("study_name", study_name, str),
            ("max_failure_rate", max_failure_rate, float),
        ):
            plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            if wrong := check_kind(f"hydra.sweeper.{name}", plain, hint):
                raise ConfigError(wrong.message)
        self._settings = SearchSettings(
            n_trials=n_trials,
            n_jobs=n_jobs,
            directions=(direction,) if isinstance(direction, str) else tuple(direction),
            storage=storage,
            study_name=study_name,
            max_failure_rate=max_failure_rate,
        )
        self._sampler = sampler
        self._params = params or OmegaConf.create({})
        self.hydra_context: HydraContext | None = None
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Runs the search, saves its tables and figures, and prints its results."""
        import optuna

        from bs_exp.search.search import Search, ignoring_experimental
        from bs_exp.search.space import parse_space

        assert self.config is not None and self.hydra_context is not None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        params = OmegaConf.to_container(self._params, resolve=True)
        assert isinstance(params, dict)
        space = parse_space({str(key): value for key, value in params.items()}, arguments, parser)
        # Misspelt settings are found here, before there is a study.
        config = self._compose(space.overrides(self._somewhere(space)))
        if not _ROOT_DIALS & space.distributions.keys():  # else points may be refused one by one
            check_root(config)
        if wrong := wrong_settings(self._sampler, "hydra.sweeper.sampler", {}):
            raise ConfigError(wrong[0].message)
        with ignoring_experimental():
            sampler = instantiate(self._sampler, _convert_="all")
        search = Search(
            settings=self._settings,
            space=space,
            identity=_identity(config, space, self._settings.directions, self._searched(space)),
            sampler=sampler,
            folder=Path(self.config.hydra.sweep.dir).absolute(),
        )
        self._compare_jobs()
        search.conclude(search.run(lambda points, first: self._run(space, points, first)))

    def _compare_jobs(self) -> None:
        """Prints a note if `n_jobs` does not fit the launcher."""
        from bs_exp.search.search import say

        assert self.config is not None
        jobs, serial = self._settings.n_jobs, self.config.hydra.launcher._target_.endswith(".BasicLauncher")
        if serial and jobs > 1:
            say(
                f"note: hydra.sweeper.n_jobs={jobs} trials are run one by one; hydra/launcher=joblib runs them at once."
            )
        if not serial and jobs == 1:
            say("note: hydra.sweeper.n_jobs=1 hands the launcher one trial at a time; raise it to what it can run.")

    def _run(self, space: SearchSpace, points: Sequence[Mapping[str, Value]], first: int) -> Sequence[TrialOutcome]:
        """Launches the points whose settings compose; the outcome of the others is the error."""
        assert self.launcher is not None
        checked = [self._check(space, point) for point in points]
        legal = [list(overrides) for overrides, error in checked if error is None]
        jobs = iter(self.launcher.launch(legal, initial_job_idx=first) if legal else ())
        direction = self._settings.directions[0]
        return [_outcome(overrides, error, None if error else next(jobs), direction) for overrides, error in checked]

    def _check(self, space: SearchSpace, point: Mapping[str, Value]) -> tuple[list[str], str | None]:
        """The overrides of a point, and an error if they do not compose."""
        try:
            overrides = space.overrides(self._applicable(space, point))
            self._compose(overrides)
        except (HydraException, OmegaConfBaseException) as error:
            return space.overrides(point), explain(error)
        return overrides, None

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        assert self.config is not None and self.hydra_context is not None
        return self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))

    def _groups(self, space: SearchSpace) -> list[str]:
        """The parameters that choose an option of a config group."""
        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        return [key for key in space.distributions if loader.get_group_options(key, ObjectType.CONFIG)]

    def _applicable(self, space: SearchSpace, point: Mapping[str, Value]) -> dict[str, Value]:
        """The parameters of a point that exist under its options: allocation=uniform has no `allocation.beta`."""
        groups = self._groups(space)
        if not groups:
            return dict(point)
        config = OmegaConf.to_container(self._compose(space.overrides({key: point[key] for key in groups})))
        return {key: value for key, value in point.items() if key in groups or _has(config, key)}

    def _searched(self, space: SearchSpace) -> list[Any]:
        """Configurations, as plain data, that name every class that the search may choose."""
        found: list[Any] = [
            {"_target_": option}
            for key in space.distributions
            if key.rpartition(".")[2] == "_target_"
            for option in space.options(key)
        ]
        groups, anywhere = self._groups(space), space.anywhere()
        for group in groups:
            for option in space.options(group):
                config = self._compose(space.overrides({**{key: anywhere[key] for key in groups}, group: option}))
                own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
                found.append(OmegaConf.to_container(own, resolve=False))
        return found

    def _somewhere(self, space: SearchSpace) -> dict[str, Value]:
        """The first point of the space. A parameter that belongs to no option stays in it, so composing refuses it."""
        point, groups = space.anywhere(), self._groups(space)
        found = self._applicable(space, point)
        for group in groups:
            for option in space.options(group):
                found |= self._applicable(space, {**point, group: option})
        belongs = self._applicable(space, point)
        return {key: point[key] for key in point if key in belongs or key not in found}


def _lacks_space(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, says that a file could not grow, or that the cache cannot be written."""
    while error is not None:
        if isinstance(error, CacheError):
            return True
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__cause__ or error.__context__
    return False


def _outcome(overrides: Sequence[str], error: str | None, job: JobReturn | None, direction: str) -> TrialOutcome:
    """The outcome of a point that was launched as a job; of one that did not compose, the error.

    Where no objective was set, its name is known only now, and so whether `direction` goes the right way.
    """
    from bs_exp.search.search import TrialOutcome

    point = tuple(overrides)
    if job is None:
        return TrialOutcome(error=error, overrides=point)
    folder = None if job.hydra_cfg is None else str(job.hydra_cfg.hydra.runtime.output_dir)
    if job.status is not JobStatus.COMPLETED:
        # Not `return_value`: that raises, and prints.
        if _lacks_space(job._return_value):
            raise job._return_value  # not the point's fault: the search ends, and a new start repeats it
        return TrialOutcome(error=explain(job._return_value), overrides=point, folder=folder)
    if job.return_value is None:
        error = "the run returned no objective: set objective to a metric of the evaluation."
        return TrialOutcome(error=error, overrides=point, folder=folder)
    values = job.return_value if isinstance(job.return_value, tuple | list) else (job.return_value,)
    names = _names(folder)
    chosen = job.cfg is not None and job.cfg.objective is not None
    if len(names) == 1 and not chosen and lower_is_better(names[0]) != (direction == "minimize"):
        wanted = "minimize" if lower_is_better(names[0]) else "maximize"
        error = (
            f"objective is null, so the run returned {names[0]}, which hydra.sweeper.direction={direction} would make "
            f"worse. Set objective={names[0]} and hydra.sweeper.direction={wanted}."
        )
        return TrialOutcome(error=error, overrides=point, folder=folder)
    return TrialOutcome(tuple(float(value) for value in values), overrides=point, folder=folder, names=names)


def _has(node: Any, key: str) -> bool:
    """Whether a configuration, as plain data, has a setting, which may be null or mandatory."""
    for part in key.split("."):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            return False
    return True


def _names(folder: str | None) -> tuple[str, ...]:
    """The names of the objectives in a run's record; empty if this machine has no such record."""
    if folder is None:
        return ()
    try:
        return tuple(objectives(read_record(Path(folder))))
    except RecordError:
        return ()


def _identity(config: DictConfig, space: SearchSpace, directions: Sequence[str], searched: Sequence[Any]) -> Identity:
    """The study's identity: directions, objectives, parameters, and every other setting that results depend on.

    So is the source of foreign code, that of classes too that the search may choose (`searched`).
    """
    from bs_exp.search.study import Identity

    asked = config.objective
    objectives = tuple(asked) if isinstance(asked, ListConfig) else (asked or "objective",)
    if len(objectives) != len(directions):
        raise ConfigError(
            f"hydra.sweeper.direction names {len(directions)} directions ({', '.join(directions)}), and the run "
            f"returns {len(objectives)} objectives ({', '.join(objectives)}). Set as many, as in objective=[A,B] and "
            "hydra.sweeper.direction=[minimize,maximize]."
        )
    # A copy without Hydra's own node, whose values are those of this process.
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    resolved = OmegaConf.to_container(own, resolve=True, enum_to_str=True)
    assert isinstance(resolved, dict)
    settings = result_settings(resolved)
    settings.pop("objective")
    # A parameter may be an option of a group: then all of its node depends on it.
    varied = tuple(key.replace("/", ".") for key in space.distributions)
    fixed = {
        key: value
        for key, value in _leaves(settings)
        if not any(key == name or key.startswith(f"{name}.") for name in varied)
    }
    # Trials of other code do not compare with this one's.
    named = [{"_target_": value} for key, value in fixed.items() if key.rpartition(".")[2] == "_target_"]
    fixed |= {f"code of {target}": _digest(code) for target, code in targets_code([named, *searched]).items()}
    return Identity(tuple(directions), objectives, space.describe(), fixed)


def _digest(code: Mapping[str, str]) -> str:
    """One hash of a strategy's modules."""
    return hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    match node:
        case dict() if node:
            for name, value in node.items():
                yield from _leaves(value, f"{key}.{name}" if key else str(name))
        case list() if node:
            for index, value in enumerate(node):
                yield from _leaves(value, f"{key}.{index}")
        case _:
            yield key, node
