"""`bs-exp --help`, made from the option files: every option with the beginning of its first comment. `--version`."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import shorten, wrap
from typing import Any

import yaml

from bs_exp.cli.commands import COMMANDS
from bs_exp.cli.conf_root import root_folder
from bs_exp.cli.explain import list_options
from bs_exp.cli.path_options import GROUPS
from bs_exp.errors import ConfigError

_FLAGS = frozenset({"-h", "--help"})
_NARROWEST, _WIDEST = 80, 120
# Of groups with more options, the page has the names alone; but presets are what most people choose, and nothing else.
_MOST_LINES, _IN_FULL = 15, "experiment"
# Shown first, in this order; the others follow as conf/config.yaml lists them.
_FIRST = ("experiment", "model", "data")
_USAGE = """\
bs-exp: low-rank compression of language models by sharing; dense and compressed, side by side.

  bs-exp model=DIR data=FILE retain_ratio=0.8 save_model=true    one run: your own model, or model=ORG/NAME of the hub
  bs-exp -m experiment=svd_llm,best retain_ratio=0.8,0.6,0.5     a grid; the same command goes on where it stopped
  bs-exp demo                                                    four methods on the embedded model, and a table
  bs-exp sweeps=table_perplexity model=demo                      a table or figure that is ready: {sweeps}"""
_MORE = """\
  bs-exp --help GROUP, --help GROUP=OPTION    all that the options of a group say; the option's file
  bs-exp --cfg job SETTING ...                every setting with its value; bs-exp estimate SETTING ...: what it costs
  bs-exp --version, --shell-completion, --hydra-help, --info
"""


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether the page is asked for, instead of a run."""
    return bool(_FLAGS & set(arguments))


def help_text(arguments: Sequence[str]) -> str:
    """The page, or what is to be known of the group or option that stands among the arguments; ConfigError if none."""
    named = [argument for argument in arguments if not argument.startswith("-")]
    if not named:
        return _page()
    group, sign, option = named[0].partition("=")
    folder = root_folder() / "conf" / group
    if group == "sweeps":
        folder = root_folder() / group
    if not group or not folder.is_dir():
        known = [*_groups(), "corpus", "sweeps"]
        raise ConfigError(f"{group!r} is no group. {list_options('Groups', group, known)}")
    options = _options(folder)
    # A folder of options, such as experiment=best_without, is a group in the group.
    chosen = {name: told for name, told in options.items() if not sign or name.startswith(f"{option}/")}
    if chosen:
        return "\n".join(_whole_group(group, chosen))
    if option not in options:
        raise ConfigError(f"{named[0]} does not exist. {list_options(f'Options of {group}', option, options)}")
    return (folder / f"{option}.yaml").read_text(encoding="utf-8").rstrip()


def version_text() -> str:
    """Versions of bs_exp and of what its results depend on; nothing is imported for it."""
    found = []
    for package in ("bs-exp", "torch", "transformers"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} (not installed as a package)")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def _page() -> str:
    width = max(_NARROWEST, min(shutil.get_terminal_size((100, 50)).columns, _WIDEST))
    lines = [_USAGE.format(sweeps="--help sweeps")]
    lines += [f"  bs-exp {f'{name} {about.usage}':<36} {about.told}" for name, about in COMMANDS.items()]
    lines += [_MORE, "Settings of every run (defaults in brackets):"]
    lines += wrap(
        ", ".join(f"{name} [{_written(value)}]" for name, value in _dials().items()),
        width, initial_indent="  ", subsequent_indent="  ",
    )  # fmt: skip
    lines += ["", "Options, as GROUP=OPTION (* is the default); each has settings of its own, GROUP.SETTING=VALUE:"]
    for group, default in _groups().items():
        lines += _group(group, default, width)
    return "\n".join(lines)


def _group(group: str, default: str | None, width: int) -> Iterator[str]:
    # Those inside folders (best_without/steps) stand in the help of their group.
    options = {name: told for name, told in _options(root_folder() / "conf" / group).items() if "/" not in name}
    if len(options) > _MOST_LINES and group != _IN_FULL:
        shown = ", ".join(name + "*" * (name == default) for name in options)
        yield from wrap(shown, width, initial_indent=f"{group:<12}", subsequent_indent=" " * 12, break_on_hyphens=False)
        return
    longest = max(map(len, options)) + 1
    for number, (name, told) in enumerate(options.items()):
        start = f"{group if number == 0 else '':<12}{name + '*' * (name == default):<{longest}}  "
        yield start + shorten(told, width - len(start), placeholder=" ...")


def _whole_group(group: str, options: dict[str, str]) -> Iterator[str]:
    width = max(_NARROWEST, min(shutil.get_terminal_size((100, 50)).columns, _WIDEST))
    for name, told in options.items():
        yield f"{group}={name}"
        yield from wrap(told, width, initial_indent="    ", subsequent_indent="    ")
    if group in GROUPS:
        yield f"or {GROUPS[group]}"


def _options(folder: Path) -> dict[str, str]:
    """The first comment of each option file by the option's name; those inside folders too, parts of options not."""
    files = [path for path in sorted(folder.rglob("*.yaml")) if not path.name.startswith("_")]
    nested = {path: path.relative_to(folder).with_suffix("").as_posix() for path in files}
    return {nested[path]: _first_comment(path) for path in files if "grids" not in nested[path].split("/")}


def _first_comment(path: Path) -> str:
    """The first comment of a file as one line, without Hydra's own header."""
    found: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @"):
            continue
        if not line.startswith("#"):
            break
        found.append(line.lstrip("# ").rstrip())
    return " ".join(found)


def _root() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((root_folder() / "conf" / "config.yaml").read_text(encoding="utf-8"))
    return found


def _groups() -> dict[str, str | None]:
    """The groups and their defaults, in the order of the page."""
    listed = [entry for entry in _root()["defaults"] if isinstance(entry, dict)]
    found = {str(name): option for entry in listed for name, option in entry.items()}
    known = {name: option for name, option in found.items() if (root_folder() / "conf" / name).is_dir()}
    return {name: known[name] for name in (*_FIRST, *known) if name in known}


def _dials() -> dict[str, Any]:
    return {name: value for name, value in _root().items() if name not in ("defaults", "hydra", "cache")} | {
        "cache.dir": _root()["cache"]["dir"]
    }


def _written(value: object) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True)).splitlines()[0]
