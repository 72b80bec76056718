"""Which run a configuration describes: its settings, its hash, its folder, and the record that it begins with."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bs_exp.cli.explain import INTERNAL_KEYS
from bs_exp.files import name_fault
from bs_exp.records.folder_names import point_folder, run_words, sweep_folder
from bs_exp.records.inputs import CODE, FILES, file_stamps
from bs_exp.records.record import RunRecord
from bs_exp.records.settings import WITHOUT_EFFECT, result_settings
from bs_exp.records.sweep import finished_record, shown_settings
from bs_exp.source_code import targets_code

# The name under which the source of foreign code enters the hash; no setting of the root is called so.
_CODE = "(code)"
# A folder's name that says what was set is better than a hash, as long as it is short and plain.
_SWEEP_DIGITS = 8
_PLAIN_NAME = re.compile(r"[\w.,=+-]{1,80}")

OmegaConf.register_new_resolver("bs_exp.sweep", lambda *, _root_: sweep_name(_root_), replace=True)
OmegaConf.register_new_resolver("bs_exp.point", lambda *, _root_: point_name(_root_), replace=True)


def describe(cfg: DictConfig) -> tuple[RunRecord, Path]:
    """The record with which a run begins, and the run's folder."""
    from bs_exp.runs.recorder import new_record

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    config = plain_settings(cfg)
    record = new_record(
        name=cfg.name,
        config=config,
        config_hash=config_hash(config),
        folder=folder,
        choices={
            str(group): str(option)
            for group, option in hydra.runtime.choices.items()
            if option is not None and not {"/", "@"} & set(str(group))
        },
        sweep={
            "id": Path(hydra.sweep.dir).name,
            "job": hydra.job.num,
            "settings": list(shown_settings(hydra.overrides.task)),
        }
        if in_sweep()
        else None,
        provenance=_provenance(config),
    )
    return record, folder


def _provenance(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the result depends on besides settings, as far as it is known before the run: foreign code, input files."""
    settings = result_settings(config)
    found = {CODE: targets_code(settings), FILES: file_stamps(settings) if in_sweep() else {}}
    return {key: value for key, value in found.items() if value}


def in_sweep() -> bool:
    """Whether the run at hand is one of several that Hydra starts."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def is_kept(cfg: DictConfig, folder: Path) -> bool:
    """Whether a point that finished before, in its folder, need not be run again."""
    config = plain_settings(cfg)
    inputs = file_stamps(result_settings(config))
    finished = partial(finished_record, folder, config_hash(config), with_model=cfg.save_model, inputs=inputs)
    return not cfg.force and finished(tell=None) is not None


def plain_settings(cfg: DictConfig) -> dict[str, Any]:
    """Every setting as plain data, without Hydra's own."""
    # A copy: in the whole, resolving would ask Hydra for the folder, whose name depends on the result.
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in INTERNAL_KEYS])
    plain = OmegaConf.to_container(own, resolve=False)
    # A value that is missing cannot be resolved; `build` says so, and the record of the failure must exist.
    config = plain if missing_keys(plain) else OmegaConf.to_container(own, resolve=True, enum_to_str=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def missing_keys(node: Any, key: str = "") -> list[str]:
    """Full keys of mandatory values that are not set."""
    match node:
        case "???":
            return [key]
        case dict():
            return [
                found for k, value in node.items() for found in missing_keys(value, f"{key}.{k}" if key else str(k))
            ]
        case list():
            return [found for i, value in enumerate(node) for found in missing_keys(value, f"{key}[{i}]")]
        case _:
            return []


def hash_of(cfg: DictConfig) -> str:
    """`config_hash` of a composed configuration."""
    return config_hash(plain_settings(cfg))


def config_hash(config: Mapping[Any, Any]) -> str:
    """SHA-256 of all settings that can change a result, and of the source of code of others that they name."""
    settings = result_settings(config)
    if code := targets_code(settings):
        settings[_CODE] = code
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def sweep_name(cfg: DictConfig) -> str:
    """Name of a sweep's folder: its own where `name` is set, else its file and what was set besides.

    So the same sweep finds its points again. Settings that change no result do not count. Of what is too long for a
    name, or not plain, a hash stands behind the words.
    """
    overrides = list(cfg.hydra.overrides.task)
    given = next((o.removeprefix("name=") for o in reversed(overrides) if o.startswith("name=")), "")
    if _PLAIN_NAME.fullmatch(given) and "," not in given and name_fault(given) is None:
        return given
    name = cfg.hydra.runtime.choices.get("sweeps") or "grid"
    ignored = {"sweeps", *WITHOUT_EFFECT}
    overrides = sorted(o for o in overrides if re.split(r"[=.@]", o.lstrip("+~"))[0] not in ignored)
    if not overrides:
        return str(name)
    readable = f"{name},{','.join(overrides)}"
    if _PLAIN_NAME.fullmatch(readable):
        return readable
    # As it is written: where the folder is set by hand, it is not looked for.
    place = OmegaConf.to_container(cfg.hydra.sweep, resolve=False)
    parent, sign, _ = str(place["dir"] if isinstance(place, dict) else "").partition("/${bs_exp.sweep:}")
    digits = hashlib.sha256(readable.encode()).hexdigest()[:_SWEEP_DIGITS]
    return sweep_folder(Path(parent) if sign else None, str(name), overrides, digits)


def point_name(cfg: DictConfig) -> str:
    """Name of a point's folder in its sweep; what all points have in common is not told (`multirun` lists it)."""
    hydra = cfg.hydra
    common = set(hydra.job.config.override_dirname.exclude_keys)
    own = [o for o in hydra.overrides.task if o.partition("=")[0].lstrip("+~") not in common]
    method = hydra.runtime.choices.get("experiment") or cfg.name
    return point_folder(Path(hydra.sweep.dir), hash_of(cfg), run_words(str(method), cfg.retain_ratio, own))
