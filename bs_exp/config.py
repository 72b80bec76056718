"""Configuration: the root's schema, and from a composed configuration to an `Experiment`.

With `__main__`, the only file that knows Hydra. Groups are YAML with `_target_`: the constructor is their schema.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from bs_exp.cache import Cache
from bs_exp.errors import BsExpError, ConfigError
from bs_exp.experiment import Experiment
from bs_exp.pipeline import Recipe
from bs_exp.recording import new_record
from bs_exp.records import RunRecord

_PACKAGE = Path(__file__).resolve().parent
# What does not change a result, and so not the hash of its configuration either.
_NOT_HASHED = frozenset({"name", "cache", "debug", "save_model", "tracking"})
# In a node, but no dials.
_INTERNAL_KEYS = frozenset({"hydra", "_target_"})


def root_folder() -> Path:
    """The folder that holds `conf/` and `sweeps/`: inside an installed package, at the top of a source checkout."""
    return _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent


@dataclass
class CacheConfig:
    """Where Grams and decompositions are kept."""

    dir: str | None = MISSING


@dataclass
class RootConfig:
    """The dials of every run, and one node per group. Values and their meaning stand in `conf/config.yaml`."""

    name: str = MISSING
    seed: int = MISSING
    retain_ratio: float = MISSING
    objective: str | None = MISSING
    save_model: bool = MISSING
    debug: bool = MISSING
    cache: CacheConfig = field(default_factory=CacheConfig)
    model: dict[str, Any] = MISSING
    calibration: dict[str, Any] = MISSING
    sharing: dict[str, Any] = MISSING
    whitening: dict[str, Any] = MISSING
    importance: dict[str, Any] = MISSING
    allocation: dict[str, Any] = MISSING
    layout: dict[str, Any] = MISSING
    schedule: dict[str, Any] = MISSING
    update: dict[str, Any] = MISSING
    evaluation: dict[str, Any] = MISSING
    tracking: dict[str, Any] = MISSING


ConfigStore.instance().store(name="root_schema", node=RootConfig)
OmegaConf.register_new_resolver("bs_exp.root", lambda: str(root_folder()), replace=True)
# Cached: one suffix per composed configuration, shared by all jobs of a sweep.
OmegaConf.register_new_resolver("bs_exp.suffix", lambda: secrets.token_hex(3), use_cache=True, replace=True)


def build(cfg: DictConfig) -> Experiment:
    """The experiment that a configuration describes; every setting is checked before any work begins."""
    _check_complete(cfg)
    recipe = Recipe(
        calibration=_make(cfg, "calibration.set"),
        sharing=_make(cfg, "sharing"),
        whitening=_make(cfg, "whitening"),
        importance=_make(cfg, "importance"),
        allocation=_make(cfg, "allocation"),
        layout=_make(cfg, "layout"),
        schedule=_make(cfg, "schedule"),
        update=_make(cfg, "update"),
        retain_ratio=cfg.retain_ratio,
    )
    return Experiment(
        model=_make(cfg, "model"),
        recipe=recipe,
        evaluators={name: _make(cfg, f"evaluation.evaluators.{name}") for name in cfg.evaluation.evaluators},
        tracker=_make(cfg, "tracking"),
        cache=Cache(None if cfg.cache.dir is None else Path(cfg.cache.dir).absolute()),
        seed=cfg.seed,
        objective=cfg.objective,
        save_model=cfg.save_model,
    )


def _check_complete(cfg: DictConfig) -> None:
    known = RootConfig.__dataclass_fields__.keys()
    if unknown := [str(key) for key in cfg if key not in known]:  # added with `+`: nothing would read it
        raise ConfigError(f"{unknown[0]} does not exist. {_options('Keys there', unknown[0], known)}")
    if missing := _missing(OmegaConf.to_container(cfg, resolve=False)):
        raise ConfigError(f"{', '.join(missing)} must be set, as in {missing[0]}=VALUE.")


def _missing(node: Any, key: str = "") -> list[str]:
    """Full keys of mandatory values that are not set."""
    match node:
        case "???":
            return [key]
        case dict():
            return [found for k, value in node.items() for found in _missing(value, f"{key}.{k}" if key else str(k))]
        case list():
            return [found for i, value in enumerate(node) for found in _missing(value, f"{key}[{i}]")]
        case _:
            return []


def _make(cfg: DictConfig, key: str) -> Any:
    """The strategy at a key; what its constructor refuses comes back with the full key of the dial."""
    try:
        return instantiate(OmegaConf.select(cfg, key), _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ConfigError):
            group, dial = key.split(".")[0], str(cause).split(" ")[0]
            if dial.startswith(f"{group}."):
                raise cause from error
            raise ConfigError(f"{group}.{cause}" if dial in cfg[group] else f"{group}: {cause}") from error
        raise


def describe(cfg: DictConfig) -> tuple[RunRecord, Path]:
    """The record with which a run begins, and the run's folder."""
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    plain = OmegaConf.to_container(cfg, resolve=False)
    # A value that is missing cannot be resolved; `build` says so, and the record of the failure must exist.
    config = plain if _missing(plain) else OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    assert isinstance(config, dict)
    in_sweep = hydra.mode == RunMode.MULTIRUN
    record = new_record(
        name=cfg.name,
        config={str(key): value for key, value in config.items()},
        config_hash=config_hash(config),
        folder=folder,
        sweep={"id": Path(hydra.sweep.dir).name, "job": hydra.job.num} if in_sweep else None,
    )
    return record, folder


def config_hash(config: Mapping[Any, Any]) -> str:
    """SHA-256 of all settings that can change a result."""
    settings = {key: value for key, value in config.items() if key not in _NOT_HASHED}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def explain(error: BaseException) -> str:
    """What went wrong in a user's words: the full key, the value, what is allowed, the closest match."""
    return "\n".join([_explain(error), *getattr(error, "__notes__", [])])


def _explain(error: BaseException) -> str:
    cause = error.__cause__
    match error:
        case BsExpError():
            return str(error)
        case MissingConfigException(missing_cfg_file=str(file), options=[*options]):
            group, _, option = file.rpartition("/")
            return f"{group}={option} does not exist. {_options(f'Options of {group}', option, options)}"
        case ConfigCompositionException() if isinstance(cause, ConfigAttributeError | ConfigKeyError):
            keys = [str(key) for key in cause.parent_node if key not in _INTERNAL_KEYS]
            return f"{cause.full_key} does not exist. {_options('Keys there', str(cause.key), keys)}"
        case ConfigCompositionException() if isinstance(cause, OmegaConfBaseException):
            return _explain(cause)
        case OmegaConfBaseException():
            return f"{error.full_key}: {str(error).splitlines()[0]}."
        case OverrideParseException():
            return f"{error.override!r} is not understood; settings have the form key=value. {error.message}"
        case InstantiationException() if cause is not None:
            return f"{str(error).splitlines()[-1].removeprefix('full_key: ')}: {cause}"
        case HydraException():
            return str(error)
        case KeyboardInterrupt():
            return "interrupted."
        case SystemExit():
            return f"told to stop ({error.code})."
        case OSError() | MemoryError():
            return f"{type(error).__name__}: {error}"
        case _:
            return f"unexpected {type(error).__name__}: {error} (HYDRA_FULL_ERROR=1 or debug=true shows the traceback)"


def _options(title: str, wrong: str, options: Iterable[str]) -> str:
    names = sorted(options)
    close = difflib.get_close_matches(wrong, names, n=1)
    return (f"Did you mean {close[0]}? " if close else "") + f"{title}: {', '.join(names)}."
