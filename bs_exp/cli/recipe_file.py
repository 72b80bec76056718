"""The recipe of a run, from its configuration: every setting, in a file that `bs-exp --config-name` takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bs_exp.cli.arguments import written
from bs_exp.cli.conf_root import root_folder
from bs_exp.cli.explain import INTERNAL_KEYS
from bs_exp.records.inputs import READ
from bs_exp.runs.model_card import RunRecipe

_MISSING = "???"
_PATHS = "PATH/TO/"
# Of what is set: names, places and switches of the run itself.
_OWN = frozenset(
    {"cache", "debug", "experiment", "force", "hydra", "name", "sample", "save_model", "sweeps", "tracking"}
)
# A path from a root or a home folder, as it may stand inside a value.
_ABSOLUTE = re.compile(r"(?<![\w.~/$}])(?:~|/)[^\s,'\"\]}]*[^\s,'\"\]}/]")
_HEADER = """\
# How the model beside this file was made, every setting. To make it again:
#   {command}
"""


def run_recipe(cfg: DictConfig, settings: Iterable[str]) -> RunRecipe:
    """The recipe of a composed configuration; `settings` are what was set, as the command line takes it.

    References between settings stay references, so that a dial can be turned on top of it. Paths of this machine are
    left out, and have to be given. Nothing is tracked, and the model is saved, whatever the run itself did.
    """
    whole = OmegaConf.to_container(
        OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in INTERNAL_KEYS]), resolve=False
    )
    assert isinstance(whole, dict)
    given: list[str] = []
    plain = {str(k): v if k == "sample" else _without_paths(v, str(k), given) for k, v in whole.items()}
    defaults: Any = OmegaConf.load(root_folder() / "conf" / "config.yaml")
    plain |= {"save_model": True, "debug": False, "force": False}
    plain["tracking"] = {"_target_": "bs_exp.tracking.none.NullTracker"}
    plain["cache"] = {**plain["cache"], "dir": defaults.cache.dir}
    given = [setting for setting in given if setting.partition(".")[0] not in _OWN]
    shown = [_shown(s) for s in settings if re.split(r"[=.@]", s.lstrip("+~"))[0] not in _OWN]
    head = {
        "defaults": [
            "root_schema",
            {"override hydra/job_logging": "quiet"},
            {"override hydra/hydra_logging": "quiet"},
            "_self_",
        ],
        "hydra": OmegaConf.to_container(defaults.hydra, resolve=False),
    }
    return RunRecipe(render=partial(_render, head, plain, tuple(given)), settings=tuple(shown), given=tuple(given))


def _render(head: dict[str, Any], settings: dict[str, Any], given: tuple[str, ...], revision: str | None) -> str:
    if revision is not None:
        settings = {**settings, "model": {**settings["model"], "revision": revision}}
    command = RunRecipe(render=str, given=given).command("FOLDER_OF_THIS_FILE")
    return _HEADER.format(command=command) + OmegaConf.to_yaml(OmegaConf.create({**head, **settings}))


def _without_paths(node: Any, key: str, given: list[str]) -> Any:
    """Plain settings without paths of this machine; what stands there in place of them is added to `given`."""
    match node:
        case dict():
            return {k: _without_paths(v, f"{key}.{k}", given) for k, v in node.items()}
        case list() if _reads(key) and any(_is_local(value) for value in node):
            given.append(f"{key}=[{','.join(written(_replaced(str(value))) for value in node)}]")
            return _MISSING
        case list():
            return [_without_paths(value, key, given) for value in node]
        case str() if node == _MISSING or _is_absolute(node) or (_reads(key) and _is_local(node)):
            value = written(_replaced(node))
            given.append(f"{key}=[{value}]" if key.endswith(".files") else f"{key}={value}")
            return _MISSING
        case _:
            return node


def _reads(key: str) -> bool:
    return key.rpartition(".")[2] in READ


def _is_absolute(value: str) -> bool:
    return value.startswith(("/", "~/")) and len(value) > 2


def _is_local(value: Any) -> bool:
    return isinstance(value, str) and "${" not in value and (_is_absolute(value) or Path(value).exists())


def _replaced(path: str) -> str:
    return _PATHS + (Path(path).name if path != _MISSING else "IT")


def _shown(setting: str) -> str:
    """A setting without paths of this machine."""
    key, sign, value = setting.partition("=")
    if sign and (key in ("model", "data") or _reads(key)):
        names = value.strip("'\"[]").split(",")
        parts = [_replaced(n.strip("'\" ")) if _is_local(n.strip("'\" ")) else n for n in names]
        value = f"[{','.join(parts)}]" if value.startswith("[") else ",".join(parts)
    value = _ABSOLUTE.sub(lambda found: _replaced(found[0]), value)
    return shlex.quote(f"{key}{sign}{value}") if " " in value else f"{key}{sign}{value}"
