"""What went wrong, in a user's words: the full key, the value, what is allowed, the closest match."""

from __future__ import annotations

import difflib
import errno
import io
import re
import signal
import traceback
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from bs_exp import processes
from bs_exp.cli.arguments import WORDS, quoted
from bs_exp.cli.commands import COMMANDS
from bs_exp.cli.conf_root import root_folder
from bs_exp.cli.path_options import GROUPS
from bs_exp.errors import BsExpError

# What the system says where no folder or file can be made.
_UNWRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR})
# What pathlib raises for links in a circle, and for ~NAME.
_LOOP = re.compile(r"Symlink loop from '(.+)'")
_NO_HOME = "Could not determine home directory"
_RUN_FOLDERS = frozenset({"hydra.run.dir", "hydra.sweep.dir"})
# What Hydra says of a launcher or sweeper whose package is not there.
_MISSING_PLUGIN = re.compile(r"Unknown plugin class : '(.+)'")
# Our settings, and what other tools call them.
_OTHER_WORDS = {
    "retain_ratio": ("ratio", "keep", "keep_ratio", "compression_ratio"),
    "hydra.run.dir": ("out", "out_dir", "output", "output_dir"),
    "model": ("model_path", "model_name", "path"),
    "model.device": ("device",),
    "model.dtype": ("dtype",),
    "experiment": ("preset", "method"),
    "data": ("dataset", "text", "texts"),
}
# What Hydra says of a list of values outside a sweep.
_SEVERAL = re.compile(r"Ambiguous value for argument '(.+)'")
# What OmegaConf says of a value that is no number.
_NO_NUMBER = re.compile(r"Value '(.*)' of type '(.+)' could not be converted to (Float|Integer)")
# Numbers as people write them: of a hundred, or with a comma for the point.
_PER_CENT = re.compile(r"(\d+(?:\.\d+)?) ?%")
_COMMA = re.compile(r"(\d),(\d+)")
_WORD = re.compile(r"[a-z_]+")
# What Hydra reads as something else than a name.
_NO_NAME = re.compile(r"[-+]?[\d._]+(e[-+]?\d+)?|true|false", re.IGNORECASE)
# In a node, but no dials.
INTERNAL_KEYS = frozenset({"hydra", "_target_"})


def explain(error: BaseException, arguments: Sequence[str] | None = None) -> str:
    """What went wrong in a user's words: the full key, the value, what is allowed, the closest match.

    With the arguments of the command line, also the option that lacks a key, which a preset may have chosen.
    """
    return "\n".join([_explain(error, arguments), *getattr(error, "__notes__", [])])


def _explain(error: BaseException, arguments: Sequence[str] | None = None) -> str:
    cause = error.__cause__
    if _was_interrupted(error):
        return "interrupted."
    match error:
        case BsExpError():
            return str(error)
        case MissingConfigException(missing_cfg_file=str(file), options=[*options]):
            group, _, option = file.rpartition("/")
            # Of an option in a folder (experiment=best_without/steps) Hydra tells those of the group around it.
            inside = sorted(path.stem for path in (root_folder() / "conf" / group).glob("[!_]*.yaml"))
            known = options if set(inside) & set(options) else inside or options
            path = f" Or {GROUPS[group]}." if group in GROUPS else ""
            if nested := sorted(found.stem for found in (root_folder() / "conf" / group / option).glob("[!_]*.yaml")):
                path += f" {group}={option}/.. has {', '.join(nested)}."
            return f"{group}={option} does not exist. {list_options(f'Options of {group}', option, known)}{path}"
        case ConfigCompositionException() if isinstance(cause, ConfigAttributeError | ConfigKeyError):
            keys = [str(key) for key in cause.parent_node if key not in INTERNAL_KEYS]
            if "." not in str(cause.full_key):
                return f"{cause.key} does not exist. {_list_of_root(str(cause.key), keys)}"
            node, *inner = str(cause.full_key).split(".")
            where = "" if arguments is None else _option_of(node, arguments)
            elsewhere = _options_with(node, str(cause.key)) if len(inner) == 1 else ""
            return (
                f"{cause.full_key} does not exist{where}. {elsewhere}{list_options('Keys there', str(cause.key), keys)}"
            )
        case ConfigCompositionException() if isinstance(cause, OmegaConfBaseException):
            return _explain(cause)
        case OmegaConfBaseException() if (refused := _refused(error)) is not None:
            return str(refused)
        case OmegaConfBaseException() if "is not Optional" in str(error):
            return f"{error.full_key} must not be null: give it a value, as in {error.full_key}=VALUE."
        case OmegaConfBaseException() if unread := _NO_NUMBER.match(str(error)):
            value, kind, number = unread.groups()
            wanted = "a whole number" if number == "Integer" else "a number"
            got = repr(value) if kind == "str" else value
            return f"{error.full_key} must be {wanted}, got {got}.{_as_number(str(error.full_key), value)}"
        case OmegaConfBaseException():
            return f"{error.full_key}: {str(error).splitlines()[0]}."
        case OverrideParseException():
            return _not_understood(str(error.override), str(error.message))
        case InstantiationException() if cause is not None:
            key = str(error).splitlines()[-1].removeprefix("full_key: ")
            return str(cause) if str(cause).startswith(f"{key}.") else f"{key}: {cause}"
        case RuntimeError() if looped := _LOOP.match(str(error)):
            return f"{looped[1]} is a link that leads back to itself: name the folder or file itself, or make it anew."
        case RuntimeError() if str(error).startswith(_NO_HOME):
            return (
                "a path begins with ~ and a name that no user has here, so there is no home folder: write it in full."
            )
        case RuntimeError() if missing := _MISSING_PLUGIN.match(str(error)):
            return (
                f"{missing[1]} is not installed. Launchers come with an extra: pip install '.[cluster]'. "
                "Without one, points run one after the other."
            )
        case HydraException() if several := _SEVERAL.search(str(error)):
            key, _, value = several[1].partition("=")
            meant = _as_number(key, value)
            grid = f"For a grid with a point for each: bs-exp --multirun (-m) {several[1]}"
            return f"{several[1]} names several values.{meant} {grid}"
        case HydraException():
            return _group_without_option(arguments or ()) or str(error)
        case ValueError() if nameless := [argument for argument in arguments or () if argument.startswith("=")]:
            return f"{nameless[0]!r} is not understood; settings have the form key=value, and its key is missing."
        case ValueError() if empty := _group_without_option(arguments or ()):
            return empty
        case SystemExit():
            return _told_to_stop(error.code)
        case OSError() if error.filename and (error.errno in _UNWRITABLE or _was_asked_for(error, arguments or ())):
            return (
                f"cannot write {error.filename}: {error.strerror}. Runs and caches go into ./outputs: start in a "
                "folder that can be written, or set hydra.run.dir=DIR (of a sweep: hydra.sweep.dir=DIR) and "
                "cache.dir=DIR."
            )
        case OSError(errno=errno.ENOSPC):
            written = error.filename or _open_file(error)
            place = f" while writing {written}" if written else ""
            return (
                f"the disk is full{place} ({error.strerror}). Runs and caches go into ./outputs: free some space, or "
                "set hydra.run.dir=DIR (of a sweep: hydra.sweep.dir=DIR) and cache.dir=DIR. The same command goes on."
            )
        case OSError() | MemoryError():
            return f"{type(error).__name__}: {error}"
        case _:
            return f"unexpected {type(error).__name__}: {error} (HYDRA_FULL_ERROR=1 or debug=true shows the traceback)"


def _as_number(key: str, value: str) -> str:
    """How a number is written that has a comma or a per cent sign; empty for every other value."""
    if share := _PER_CENT.fullmatch(value):
        return f" Shares are parts of one: {key}={float(share[1]) / 100:g}."
    if parts := _COMMA.fullmatch(value):
        return f" For one number, with a point: {key}={parts[1]}.{parts[2]}."
    return ""


def _options_with(group: str, key: str) -> str:
    """The other options of a group that have a key of their own by that name, in words; empty if none has."""
    options = sorted((root_folder() / "conf" / group).glob("[!_]*.yaml"))
    found = [f"{group}={path.stem}" for path in options if _has(path, key)]
    return f"{', '.join(found)} {'has' if len(found) == 1 else 'have'} it. " if found else ""


def _has(option: Path, key: str) -> bool:
    written = yaml.safe_load(option.read_text(encoding="utf-8"))
    return isinstance(written, dict) and key in written


def _was_asked_for(error: OSError, arguments: Sequence[str]) -> bool:
    """Whether the file of an error is the folder that the arguments set for a run or a sweep, or in it."""
    folders = [value for key, _, value in (a.partition("=") for a in arguments) if key in _RUN_FOLDERS and value]
    return any(str(error.filename).startswith(folder) for folder in folders)


def _told_to_stop(code: object) -> str:
    """Which signal ended the process; one of several is stopped by the launcher when another of them has ended."""
    known = {128 + number: number.name for number in signal.Signals}
    name = known.get(code, str(code)) if isinstance(code, int) else str(code)
    others = " Another process of this run has ended, and with it all others; its message says why."
    return f"told to stop ({name}).{others if processes.launched() > 1 else ''}"


def _was_interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C is at the bottom of an error: a library that it stops midway may raise something else."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if isinstance(found, KeyboardInterrupt):
            return True
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return False


def _open_file(error: BaseException) -> str | None:
    """The file that was open where an error arose, innermost first: a write that fails does not name it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        for value in frame.f_locals.values():
            if isinstance(value, io.IOBase) and isinstance(name := getattr(value, "name", None), str):
                return name
    return None


def _refused(error: BaseException) -> BsExpError | None:
    """The error of ours that an interpolation ended with, if any."""
    found = error.__cause__ or error.__context__
    while found is not None and not isinstance(found, BsExpError):
        found = found.__cause__ or found.__context__
    return found


def _not_understood(override: str, message: str) -> str:
    if (line := quoted(override)) is not None:
        return (
            f"{override!r} is not understood: a value with blanks, letters beyond ASCII, quotes, or one of "
            f"= ( ) [ ] {{ }} : , # ~ stands in quotes of its own, and these in the shell's: {line}"
        )
    if _WORD.fullmatch(override):
        commands = list_options("Commands", override, [*COMMANDS, *WORDS])
        return f"{override!r} is no command. {commands} Settings have the form key=value: bs-exp model=DIR data=FILE."
    return f"{override!r} is not understood; settings have the form key=value. {message.splitlines()[0]}"


def _list_of_root(wrong: str, keys: Iterable[str]) -> str:
    """What may stand there in place of a word that is no setting and no group; with what other tools call by it."""
    known = list_options("Settings and groups", wrong, [*keys, "data", "experiment", "sweeps"])
    meant = next((name for name, words in _OTHER_WORDS.items() if wrong in words), None)
    return known if meant is None else f"Did you mean {meant}? {known[known.index('Settings and') :]}"


def _group_without_option(arguments: Sequence[str]) -> str | None:
    """What to say of `GROUP=null`, `GROUP=8` and `~GROUP`, which Hydra refuses without naming them; None without."""
    for argument in arguments:
        name, sign, option = argument.partition("=")
        group = name.removeprefix("~")
        folder = root_folder() / "conf" / group
        options = [path.stem for path in folder.glob("[!_]*.yaml")] if group and folder.is_dir() else []
        if options and option not in options and _NO_NAME.fullmatch(option):
            return f"{argument} does not exist. {list_options(f'Options of {group}', option, sorted(options))}"
        if group and folder.is_dir() and ((sign and option in ("null", "")) or name != group):
            known = list_options(f"Options of {group}", "none", options)
            return f"{argument}: a group needs one of its options. {known}"
    return None


def _option_of(group: str, arguments: Sequence[str]) -> str:
    """` in GROUP=OPTION`, as the command line or its preset chooses; empty if it chooses nothing that exists."""
    conf = root_folder() / "conf"
    choices = [a for a in arguments if a.startswith("sweeps=") or (conf / a.partition("=")[0]).is_dir()]
    # Inside a run, the start of a sweep for instance, Hydra is at work already, with the same folder.
    known = GlobalHydra.instance().is_initialized()
    try:
        with nullcontext() if known else initialize_config_dir(str(conf), version_base="1.3"):
            cfg = compose("config", choices, return_hydra_config=True)
    except HydraException:
        return ""
    option = cfg.hydra.runtime.choices.get(group)
    return "" if option is None else f" in {group}={option}"


def list_options(title: str, wrong: str, options: Iterable[str]) -> str:
    # What starts with an underscore is a part of options, and none itself.
    names = sorted(name for name in options if not name.startswith("_"))
    if not names:
        return f"{title}: none."
    close = difflib.get_close_matches(wrong, names, n=1) or [name for name in names if wrong and name.endswith(wrong)]
    return (f"Did you mean {close[0]}? " if close else "") + f"{title}: {', '.join(names)}."
