"""Configuration: the root's schema, and from a composed configuration to an `Experiment`.

Groups are YAML with `_target_`: the constructor is their schema.
What imports torch is imported when a run begins, so that a slip in a setting is answered at once.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf, open_dict

from bs_exp.cli.conf_root import root_folder
from bs_exp.cli.dials import with_dials
from bs_exp.cli.explain import INTERNAL_KEYS, list_options
from bs_exp.cli.objectives import check_reported
from bs_exp.cli.points import missing_keys, plain_settings
from bs_exp.cli.setting_types import source_key, wrong_settings
from bs_exp.errors import ConfigError
from bs_exp.files import name_fault
from bs_exp.source_code import targets_code
from bs_exp.validation import check_objective, check_retain_ratio, check_seed, shown

if TYPE_CHECKING:
    from bs_exp.cache import Cache
    from bs_exp.pipeline import Recipe
    from bs_exp.runs.dense_cache import DenseStore
    from bs_exp.runs.experiment import Experiment


@dataclass
class CacheConfig:
    """Where Grams and decompositions are kept, in which dtype, and how much of them."""

    dir: str | None = MISSING
    dtype: str = MISSING
    max_gb: float | None = MISSING
    keep_rounds: Any = MISSING  # auto, true or false


@dataclass
class SampleConfig:
    """What dense and compressed model write, for the report."""

    prompt: str | None = MISSING
    tokens: int = MISSING


@dataclass
class RootConfig:
    """The dials of every run, and one node per group. Values and their meaning stand in `conf/config.yaml`."""

    name: str = MISSING
    seed: int = MISSING
    retain_ratio: float = MISSING
    objective: Any = MISSING  # a metric, a list of metrics, or null
    sample: SampleConfig = field(default_factory=SampleConfig)
    save_model: bool = MISSING
    debug: bool = MISSING
    force: bool = MISSING
    dry_run: bool = MISSING
    ignore_estimate: bool = MISSING
    cache: CacheConfig = field(default_factory=CacheConfig)
    model: dict[str, Any] = MISSING
    calibration: dict[str, Any] = MISSING
    sharing: dict[str, Any] = MISSING
    whitening: dict[str, Any] = MISSING
    importance: dict[str, Any] = MISSING
    allocation: dict[str, Any] = MISSING
    layout: dict[str, Any] = MISSING
    schedule: dict[str, Any] = MISSING
    selection: dict[str, Any] = MISSING
    update: dict[str, Any] = MISSING
    precision: dict[str, Any] = MISSING
    analysis: dict[str, Any] = MISSING
    evaluation: dict[str, Any] = MISSING
    tracking: dict[str, Any] = MISSING


ConfigStore.instance().store(name="root_schema", node=RootConfig)
OmegaConf.register_new_resolver("bs_exp.root", lambda: str(root_folder()), replace=True)
# Cached: one suffix per composed configuration.
OmegaConf.register_new_resolver("bs_exp.suffix", lambda: secrets.token_hex(3), use_cache=True, replace=True)
OmegaConf.register_new_resolver("bs_exp.name", lambda name: _plain_name(name), replace=True)


def build(cfg: DictConfig, dense: DenseStore | None = None) -> Experiment:
    """The experiment that a configuration describes; every setting is checked before any work begins.

    `dense` is shared by the points of a sweep; without one, nothing is.
    """
    check_root(cfg)

    from bs_exp.cli.recipe_file import run_recipe
    from bs_exp.evaluation.sample import TextSample
    from bs_exp.runs.dense_cache import DenseStore
    from bs_exp.runs.experiment import Experiment

    make = maker(cfg)
    experiment = Experiment(
        model=make("model"),
        recipe=build_recipe(cfg, make),
        evaluators={name: make(f"evaluation.evaluators.{name}") for name in _parts(cfg)},
        analysis=make("analysis"),
        tracker=make("tracking"),
        cache=build_cache(cfg, cfg.cache.dir),
        seed=cfg.seed,
        objective=_objective(cfg.objective),
        save_model=cfg.save_model,
        card=run_recipe(cfg, HydraConfig.get().overrides.task)
        if cfg.save_model and HydraConfig.initialized()
        else None,
        selection=make("selection"),
        sample=TextSample(prompt=cfg.sample.prompt, tokens=cfg.sample.tokens) if cfg.sample.prompt else None,
        dense=dense or DenseStore(),
        ignore_estimate=cfg.ignore_estimate,
    )
    # Now that it is loaded: from here on its source counts as it is, whatever is edited while this process lives.
    targets_code(plain_settings(cfg))
    return experiment


def build_cache(cfg: DictConfig, folder: str | Path | None, *, model: str = "-") -> Cache:
    """The cache in a folder, or in memory, with the dials of `cache`."""
    from bs_exp.cache import Cache

    return Cache(
        None if folder is None else Path(folder).expanduser().absolute(),
        model,
        dtype=cfg.cache.dtype,
        max_gb=cfg.cache.max_gb,
        keep_rounds=cfg.cache.keep_rounds,
    )


def maker(cfg: DictConfig) -> Callable[[str], Any]:
    """Makes the strategy at a key of the configuration; to be had before anything is built from it."""
    # Hydra resolves references in the configuration itself.
    filled = with_dials(cfg)
    return partial(_make, filled, OmegaConf.to_container(filled, resolve=False))


def strategy_keys(cfg: DictConfig) -> list[str]:
    """The keys of all strategies that a run is built from, in the order in which they are built."""
    recipe = ("sharing", "whitening", "importance", "allocation", "layout", "schedule", "update", "precision")
    evaluators = (f"evaluation.evaluators.{name}" for name in _parts(cfg))
    return ["model", "calibration.set", *recipe, *evaluators, "analysis", "tracking", "selection"]


def build_recipe(cfg: DictConfig, make: Callable[[str], Any]) -> Recipe:
    """The strategies of the compression, and the share of parameters to keep."""
    from bs_exp.pipeline import Recipe

    return Recipe(
        calibration=make("calibration.set"),
        sharing=make("sharing"),
        whitening=make("whitening"),
        importance=make("importance"),
        allocation=make("allocation"),
        layout=make("layout"),
        schedule=make("schedule"),
        update=make("update"),
        precision=make("precision"),
        retain_ratio=cfg.retain_ratio,
    )


def _plain_name(name: Any) -> str:
    """The name of a run; ConfigError if the folder of that name would lie elsewhere, or could not be made."""
    if fault := name_fault(str(name)):
        raise ConfigError(
            f"name must be a plain name, as the folder of the run has; {str(name)!r:.100} {fault}. Folders are set "
            "with hydra.run.dir=DIR."
        )
    return str(name)


def _objective(value: Any) -> Any:
    plain = _plain(value)
    return tuple(plain) if isinstance(plain, list) else plain


def check_root(cfg: DictConfig) -> None:
    """ConfigError for settings that are missing or unknown at the root, and for the root's own; torch stays away."""
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in INTERNAL_KEYS])
    _check_complete(own)
    check_retain_ratio(own.retain_ratio)
    check_seed(own.seed)
    check_objective(_objective(own.objective))
    if own.sample.tokens < 1:
        raise ConfigError(
            f"sample.tokens must be at least 1, got {own.sample.tokens}; sample.prompt=null writes nothing."
        )
    _parts(own)


def _shown_dials(cfg: DictConfig, evaluator: str) -> DictConfig:
    """An evaluator with the texts, tasks and pairs of its group that it does not set itself, without importing it."""
    node: DictConfig = cfg.evaluation.evaluators[evaluator].copy()
    with open_dict(node):
        for name in ("corpora", "tasks", "pairs"):
            given = cfg.evaluation.get(name)
            if name not in node and isinstance(given, DictConfig | ListConfig):  # else its constructor refuses it
                node[name] = list(given)
    return node


def check_objectives(cfg: DictConfig) -> None:
    """ConfigError for an objective that none of the evaluators that are to run can report; torch stays away."""
    check_reported(_objective(cfg.objective), {name: _shown_dials(cfg, name) for name in _parts(cfg)})


def _check_complete(cfg: DictConfig) -> None:
    known = RootConfig.__dataclass_fields__.keys()
    if unknown := [str(key) for key in cfg if key not in known]:  # added with `+`: nothing would read it
        raise ConfigError(f"{unknown[0]} does not exist. {list_options('Keys there', unknown[0], known)}")
    if missing := missing_keys(OmegaConf.to_container(cfg, resolve=False)):
        raise ConfigError(f"{', '.join(missing)} must be set, as in {missing[0]}=VALUE.")
    _plain_name(cfg.name)


def _parts(cfg: DictConfig) -> list[str]:
    """Names of the evaluators that are to run, in the order of the option file."""
    evaluators, parts = (OmegaConf.select(cfg, f"evaluation.{key}") for key in ("evaluators", "parts"))
    if not isinstance(evaluators, DictConfig):
        raise ConfigError(f"evaluation.evaluators must be a mapping of names to evaluators, got {shown(evaluators)}.")
    names = [str(name) for name in evaluators]
    if parts is None:
        return names
    if not isinstance(parts, ListConfig):
        raise ConfigError(
            f"evaluation.parts must be a list of names or null, got {shown(parts)}. Parts: {', '.join(names)}."
        )
    if unknown := [str(part) for part in parts if part not in names]:
        raise ConfigError(
            f"evaluation.parts: {unknown[0]} is no part of this evaluation. {list_options('Parts', unknown[0], names)}"
        )
    return [name for name in names if name in parts]


def _make(cfg: DictConfig, written: Any, key: str) -> Any:
    """The strategy at a key; what its constructor refuses comes back with the full key of the dial.

    `written` is the configuration as plain data, with its references. Values of another type than the constructor's
    are refused whether or not it looks; where it does, in its own words.
    """
    node = OmegaConf.select(cfg, key)
    if not isinstance(node, DictConfig) or not isinstance(node.get("_target_"), str):
        raise ConfigError(
            f"{key} must be a strategy, with the import path of its class as {key}._target_, got "
            f"{shown(_plain(node))}. The options in conf/{key.split('.')[0]} are examples."
        )
    wrong = wrong_settings(node, key, written)
    try:
        made = _built(cfg, written, key)
    except (ConfigError, InstantiationException) as error:
        if wrong and not any(str(error).startswith(f"{setting.key} ") for setting in wrong):
            raise ConfigError(wrong[0].message) from error
        raise
    if wrong:
        raise ConfigError(wrong[0].message)
    return made


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _built(cfg: DictConfig, written: Any, key: str) -> Any:
    try:
        return instantiate(OmegaConf.select(cfg, key), _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        group = key.split(".")[0]
        if isinstance(cause, ConfigError):
            dial, _, told = str(cause).partition(" ")
            if dial.startswith(f"{group}."):
                raise cause from error
            # Of a strategy within another (update.updates.recover), Hydra tells the whole key.
            inner = str(error).splitlines()[-1].removeprefix("full_key: ")
            if dial.split(".")[0].rstrip(":") in (OmegaConf.select(cfg, inner) or {}):
                place = source_key(written, f"{inner}.{dial}")
                raise ConfigError(f"{place} {told}") from error
            raise ConfigError(f"{group}: {cause}") from error
        if isinstance(cause, TypeError | AttributeError | ValueError) and "unexpected keyword" not in str(cause):
            dials = OmegaConf.to_container(OmegaConf.select(cfg, key), resolve=True)
            assert isinstance(dials, dict)
            given = ", ".join(
                f"{dial!s}={shown(value)}" for dial, value in dials.items() if not str(dial).startswith("_")
            )
            raise ConfigError(
                f"{key}: one of its settings has a value of the wrong kind ({cause}). They are: {given}. The option "
                f"files in conf/{group} say what each may be."
            ) from error
        raise
