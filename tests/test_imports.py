"""Imports point one way, and only few files know Hydra."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import bs_exp

PACKAGE = Path(bs_exp.__file__).parent
STRATEGIES = (
    "sharing",
    "whitening",
    "importance",
    "allocation",
    "layout",
    "schedule",
    "selection",
    "update",
    "precision",
    "tracking",
)
# Besides `cli/`.
KNOW_HYDRA = {"bs_exp.search.space", "bs_exp.__main__", "bs_exp.api"}
# From the ground up: a room may import rooms of earlier floors only (and its own files).
FLOORS = (
    {"cache_folder", "collector", "errors", "files", "printable", "types"},
    {"cache", "identity", "linalg", "processes", "progress", "source_code", "validation"},
    {"records", "workspace"},
    {"contracts", "protocols"},
    {"models", "rank_budget", "search", "demo"},
    {"corpora", "serving", *(set(STRATEGIES) - {"update", "precision"})},
    {"calibration", "evaluation", "training"},
    {"factorization", "precision", "update"},
    {"plan_score", "reporting"},
    {"analysis", "pipeline"},
    {"estimate"},
    {"benchmarks", "runs", "testing"},
    {"cli"},
    {"__main__", "api"},
)


def _files() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts))
        yield name.removesuffix(".__init__"), path


def _imports(path: Path) -> set[str]:
    """Modules that a file imports, inside functions too; `from package import name` also counts as `package.name`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(module), names=names, level=0):
                found |= {module} | {f"{module}.{alias.name}" for alias in names}
            case ast.ImportFrom():
                pytest.fail(f"{path}: relative import in line {node.lineno}")
    return found


def _room(module: str) -> str | None:
    """`bs_exp.sharing.none` -> `sharing`; None for what is no room of the package."""
    parts = module.split(".")
    if parts[0] != "bs_exp" or len(parts) == 1:
        return None
    return parts[1] if any(parts[1] in floor for floor in FLOORS) else None


def _floor(room: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if room in floor)


MODULES = dict(_files())


def test_every_room_has_a_floor() -> None:
    rooms = {module.split(".")[1] for module in MODULES if "." in module}
    assert rooms == set().union(*FLOORS)


@pytest.mark.parametrize("module", [m for m in MODULES if "." in m])
def test_imports_point_down(module: str) -> None:
    room = module.split(".")[1]
    for imported in map(_room, _imports(MODULES[module])):
        if imported is not None and imported != room:
            assert _floor(imported) <= _floor(room), f"{module} imports {imported}, which lies above it"
            assert not (imported in STRATEGIES and room in STRATEGIES), f"strategies {room} and {imported} are coupled"


@pytest.mark.parametrize("family", STRATEGIES)
def test_strategies_of_a_family_do_not_import_each_other(family: str) -> None:
    files = {m for m in MODULES if m.startswith(f"bs_exp.{family}.")}
    # What a family has in common, no strategies.
    shared = {
        "bs_exp.sharing.layers",
        "bs_exp.importance.weighting",
        "bs_exp.precision.inputs",
    }
    for module in files:
        assert not (_imports(MODULES[module]) & (files - {module} - shared)), module


def test_only_configuration_knows_hydra() -> None:
    users = {m for m, path in MODULES.items() if {i.split(".")[0] for i in _imports(path)} & {"hydra", "omegaconf"}}
    assert {user for user in users if not user.startswith("bs_exp.cli.")} == KNOW_HYDRA
