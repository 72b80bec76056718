"""`bs-exp cache`: what the cache holds; `bs-exp cache prune`: less of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bs_exp.cache_folder import prune
from bs_exp.cli.conf_root import root_folder
from bs_exp.errors import CacheError
from bs_exp.printable import printable

_UNKNOWN = "-"
_LONGEST_HEADER = 1 << 20
# As bs_exp.cache writes it, which imports torch.
_MODEL = "_model"


@dataclass(frozen=True)
class Holding:
    """The files of a kind that were made from one model: how many, their bytes, when one was last used (seconds)."""

    kind: str
    model: str
    files: int
    size: int
    used: float


def print_cache(folder: Path | None) -> None:
    """Prints a table of what the folder holds; without one, of the folder that runs take by default."""
    folder = folder or Path(_default_folder())
    found = survey(folder)
    total = sum(holding.size for holding in found)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title, justify in (("kind", "left"), ("model", "left"), ("files", "right"), ("size", "right")):
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("last used", no_wrap=True)
    for holding in found:
        used = f"{datetime.fromtimestamp(holding.used).astimezone():%Y-%m-%d %H:%M}"
        model = escape(printable(holding.model))
        table.add_row(escape(printable(holding.kind)), model, f"{holding.files:,}", _bytes(holding.size), used)
    console = Console(highlight=False)
    if found:
        console.print(table)
    console.print(
        printable(f"{folder.absolute()}: {_bytes(total)}. It can be deleted at any time."), markup=False, soft_wrap=True
    )


def prune_cache(folder: Path | None, max_gb: float) -> None:
    """Removes what was not used for longest until so many GiB are left, and says what that freed.

    What running processes use stays.
    """
    folder = folder or Path(_default_folder())
    survey(folder)  # refuses a folder that does not exist
    freed, left = prune(folder, int(max_gb * 2**30))
    print(printable(f"{folder.absolute()}: {_bytes(freed)} freed, {_bytes(left)} left."))
    if left > max_gb * 2**30:
        print("The rest is in use by running processes.")


def survey(folder: Path) -> tuple[Holding, ...]:
    """What a cache folder holds, by kind and model, the largest first; CacheError if there is no such folder."""
    if not folder.is_dir():
        raise CacheError(
            f"there is no cache in {folder.absolute()}: no run has been made here, or cache.dir is elsewhere."
        )
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("*/*")):
        if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
            about = path.stat()
            entry = about.st_size, about.st_mtime  # set at every use, which `st_atime` is not everywhere
            found.setdefault((path.parent.name, _model(path)), []).append(entry)
    return tuple(sorted(_holdings(found), key=lambda holding: -holding.size))


def _holdings(found: dict[tuple[str, str], list[tuple[int, float]]]) -> Iterator[Holding]:
    for (kind, model), files in found.items():
        yield Holding(kind, model, len(files), sum(size for size, _ in files), max(used for _, used in files))


def _model(path: Path) -> str:
    """The model that a file says it was made from; the header of a safetensors file is JSON behind its length."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length <= _LONGEST_HEADER else {}
    except (OSError, ValueError):
        return _UNKNOWN
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return str(metadata.get(_MODEL, _UNKNOWN)) if isinstance(metadata, dict) else _UNKNOWN


def _default_folder() -> str:
    root = yaml.safe_load((root_folder() / "conf" / "config.yaml").read_text(encoding="utf-8"))
    return str(root["cache"]["dir"])


def _bytes(size: int) -> str:
    units: Sequence[str] = ("B", "kB", "MB", "GB")
    value, unit = float(size), 0
    while value >= 1000 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.{1 if unit else 0}f} {units[unit]}"
