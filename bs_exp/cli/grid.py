"""The points of a grid, and the ends of a search's space, composed and checked before any of them is run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from bs_exp.cli.config import check_objectives, check_root
from bs_exp.cli.early_check import early_checks
from bs_exp.cli.explain import explain
from bs_exp.cli.points import point_name
from bs_exp.errors import ConfigError
from bs_exp.records.sweep import SweepPoint, shown_settings, varying

# More points than these are counted.
_MOST_NAMED = 4
_Error = ConfigError | HydraException | OmegaConfBaseException


@dataclass(frozen=True)
class Job:
    """A point of a grid with its configuration, or the error of a setting that forbids it."""

    point: SweepPoint
    cfg: DictConfig | None
    refused: _Error | None


def grid(config: DictConfig, settings: Sequence[str]) -> list[Job]:
    """The points of a grid, each once; HydraException for settings that are none.

    What is wrong with a point is found as far as that can be known without torch.
    """
    loader = GlobalHydra.instance().config_loader()
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(settings))
    jobs: dict[str, Job] = {}
    # With torch at hand nothing is gained by stand-ins for it: the run checks the same.
    with nullcontext() if "torch" in sys.modules else early_checks() as check:
        for batch in BasicSweeper.split_arguments(overrides, None):
            for job in batch:
                shown = shown_settings(job)
                try:
                    cfg = loader.load_sweep_config(config, job)
                    folder = point_name(cfg)
                except (HydraException, OmegaConfBaseException, ConfigError) as error:
                    jobs.setdefault(" ".join(shown), Job(SweepPoint("", shown), None, error))
                else:
                    jobs.setdefault(folder, Job(SweepPoint(folder, shown), cfg, _refused(cfg, check)))
    return list(jobs.values())


def refuse(jobs: Sequence[Job]) -> None:
    """ConfigError if a setting forbids points: what is wrong, and with which of them if it is not all."""
    labels = varying([job.point.settings for job in jobs])
    found: dict[str, list[str]] = {}
    for job, label in zip(jobs, labels, strict=True):
        if job.refused is not None:
            found.setdefault(explain(job.refused, job.point.settings), []).append(label)
    if not found:
        return
    lines = []
    for message, points in found.items():
        lines.append(message)
        if len(points) < len(jobs):
            named = "; ".join(points[:_MOST_NAMED])
            more = f"; and {len(points) - _MOST_NAMED} more" if len(points) > _MOST_NAMED else ""
            lines.append(f"  {len(points)} of {len(jobs)} points: {named}{more}")
    raise ConfigError("\n".join([*lines, *(["Nothing was run."] if len(lines) > 1 else [])]))


def refuse_search(config: DictConfig, settings: Sequence[str]) -> None:
    """ConfigError for a setting that forbids both ends of a search's space, as far as that is known without torch.

    Where options of groups are searched, what fits depends on them: points are then refused one by one.
    """
    from bs_exp.search.space import parse_space  # imports Optuna

    loader = GlobalHydra.instance().config_loader()
    space = parse_space({}, settings, OverridesParser.create(config_loader=loader))
    if any(loader.get_group_options(key, ObjectType.CONFIG) for key in space.distributions):
        return
    messages = set[str]()
    with nullcontext() if "torch" in sys.modules else early_checks() as check:
        for values in (space.anywhere(), space.end()):
            try:
                error = _refused(loader.load_sweep_config(config, space.overrides(values)), check)
            except (HydraException, OmegaConfBaseException):  # the sweeper says what is wrong with it
                return
            messages.add("" if error is None else explain(error))
    if len(messages) == 1 and (message := messages.pop()):
        raise ConfigError(message)


def _refused(cfg: DictConfig, check: Callable[[DictConfig], None] | None) -> _Error | None:
    try:
        check_root(cfg)
        check_objectives(cfg)
        if check is not None and not cfg.debug:
            check(cfg)
    except (ConfigError, OmegaConfBaseException) as error:
        return error
    return None
