"""The options of a group, as their files make them: a contract suite has a row for every one of them."""

from __future__ import annotations

from functools import cache
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from bs_exp.cli.conf_root import root_folder

_CONF = root_folder() / "conf"


def options(group: str) -> set[str]:
    """Names of the option files."""
    return {path.stem for path in (_CONF / group).glob("[!_]*.yaml")}


def strategies(group: str) -> set[type]:
    """The classes that the option files name."""
    return {get_class(_node(f"{group}={option}")._target_) for option in options(group)}


def strategy(row: str) -> Any:
    """What a row stands for: an option and some of its dials, as on the command line."""
    return instantiate(_node(row), _convert_="all")


def option_of(row: str) -> str:
    """Name of a row's option."""
    return row.split()[0].partition("=")[2]


@cache
def _node(row: str) -> DictConfig:
    with initialize_config_dir(str(_CONF), version_base="1.3"):
        found: DictConfig = compose(overrides=[f"+{row.split()[0]}", *row.split()[1:]])
    node: DictConfig = found[row.partition("=")[0]]
    return node
