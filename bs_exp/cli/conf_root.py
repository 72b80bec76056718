"""Where the option files lie."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def root_folder() -> Path:
    """The folder that holds `conf/` and `sweeps/`: inside an installed package, at the top of a source checkout."""
    return _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent
