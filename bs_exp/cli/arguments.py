"""The arguments of the command line, made into what Hydra takes; and how to quote one that it does not."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException

from bs_exp.cli.path_options import GROUPS
from bs_exp.errors import ConfigError

_FLAGS = ("-m", "--multirun")
# A setting is repeated in a message up to so many characters.
_LONGEST_TOLD = 100
# A first word that stands for a setting.
WORDS = {"demo": "sweeps=demo", "estimate": "dry_run=true"}
# Nothing is run, and nothing is written: Hydra makes the folder of a run.
_WRITES_NOTHING = {"dry_run=true": ("hydra.run.dir=.", "hydra.output_subdir=null")}
# Behind the sign of an assignment, a quote, or where an element of a list begins.
_HOME = re.compile(r"(?<=[=\[,'\"])~(?=[/'\"]|$)")


def for_hydra(arguments: Sequence[str]) -> list[str]:
    """`demo` as its sweep, flags without a value first (argparse wants settings in one run), and `~/` expanded.

    A shell expands `~` in the beginning of a word alone, and Hydra's grammar has another use for it.
    """
    arguments = [*(WORDS.get(first, first) for first in arguments[:1]), *arguments[1:]]
    flags = [argument for argument in arguments if argument in _FLAGS]
    others = [argument for argument in arguments if argument not in _FLAGS]
    others += [also for argument in others for also in _WRITES_NOTHING.get(argument, ())]
    return flags + [_path_quoted(_HOME.sub(str(Path.home()), o)) if "=" in o else o for o in others]


def _path_quoted(argument: str) -> str:
    """`model=` and `data=` with a file or folder whose name Hydra's grammar would read otherwise, in quotes."""
    key, _, value = argument.partition("=")
    if key in GROUPS and value.startswith("[") and not _exists(value):
        # To Hydra a list of options, of which the last one's settings would count.
        several = {
            "data": "For several files: calibration=text calibration.files=[A.txt,B.txt], or their folder.",
            "model": "For several models, a point for each: bs-exp --multirun model=A,B.",
        }
        told = argument if len(argument) <= _LONGEST_TOLD else f"{argument[:_LONGEST_TOLD]} ..."
        raise ConfigError(f"{told}: {key} is one of {GROUPS[key]}, or of conf/{key}, and no list. {several[key]}")
    if key not in GROUPS or _reads_as(argument, value) or not _exists(value):
        return argument
    return f"{key}={in_quotes(value)}"


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # longer than a name can be, or with a zero byte
        return False


def written(value: str) -> str:
    """A value as a setting has it: in quotes where Hydra's grammar would read it otherwise."""
    return value if _reads_as(f"key={value}", value) else in_quotes(value)


def _reads_as(argument: str, value: str) -> bool:
    try:
        return bool(OverridesParser.create().parse_override(argument).value() == value)
    except HydraException:
        return False


def quoted(override: str) -> str | None:
    """A setting with its value in quotes, ready to be pasted into a shell; None if that does not help."""
    key, sign, value = override.partition("=")
    if not sign:
        return None
    is_list = value.startswith("[") and value.endswith("]")
    inner = f"[{','.join(in_quotes(element) for element in value[1:-1].split(','))}]" if is_list else in_quotes(value)
    candidate = f"{key}={inner}"
    try:
        OverridesParser.create().parse_override(candidate)
    except OverrideParseException:
        return None
    # Easier to read than what shlex makes of two kinds of quotes, where the shell leaves everything inside alone.
    return shlex.quote(candidate) if set(candidate) & set('"$`\\!') else f'"{candidate}"'


def in_quotes(value: str) -> str:
    """A value in quotes of Hydra's grammar; those that it has already are kept."""
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    # Backslashes count only in front of a quote.
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", value)
    escaped = re.sub(r"(\\+)$", lambda found: found[1] * 2, escaped)
    return f"'{escaped}'"
