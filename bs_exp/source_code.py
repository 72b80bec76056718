"""The source of code that is not ours, by content: what a result depends on besides settings.

Covered are a module's file, the packages around it, and all that these import in turn, inside functions too, as long as
it is somebody's own: neither of this package, nor of the standard library, nor installed (unless in the same top-level
package as the module that was asked about). Nothing is imported to find that out. Data files, and modules that are
imported by a name made at run time, are not seen.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from pkgutil import get_importer
from typing import Any

_OWN = "bs_exp"
# What this package is built on: versions stand in the record, and nobody edits them in place.
_LIBRARIES = frozenset(
    {
        *("accelerate", "datasets", "filelock", "huggingface_hub", "hydra", "hydra_plugins", "jaxtyping", "lm_eval"),
        *("matplotlib", "numpy", "omegaconf", "optuna", "pandas", "peft", "psutil", "rich", "safetensors", "scipy"),
        *("sklearn", "sqlalchemy", "sympy", "tokenizers", "torch", "transformers", "wandb", "yaml"),
    }
)
_INSTALLED = frozenset({"site-packages", "dist-packages"})


def is_own(module: str) -> bool:
    """Whether a module belongs to this package."""
    return module.partition(".")[0] == _OWN


def is_foreign(module: str) -> bool:
    """Whether a module is neither ours, nor of the standard library, nor one of the libraries we build on."""
    top = module.partition(".")[0]
    return top != _OWN and top not in _LIBRARIES and top not in sys.stdlib_module_names


def sources(module: str) -> dict[str, str]:
    """SHA-256 by module, of a foreign module and of what it imports (see above); empty if it has no file.

    What this process has loaded counts as it was when it was first asked for: an edit that came later is not in use.
    """
    top, found, waiting = module.partition(".")[0], dict[str, str](), [module]
    while waiting:
        name = waiting.pop()
        if name in found or not is_foreign(name):
            continue
        source = _read(name)
        if source is None or (source.installed and name.partition(".")[0] != top):
            continue
        found[name] = source.digest
        waiting += [*source.imports, *_parents(name)]
    return dict(sorted(found.items()))


def targets_code(settings: Any) -> dict[str, dict[str, str]]:
    """`sources` by `_target_`, for all in a configuration (plain data) that name foreign code.

    A target that cannot be found is left out; building it raises the error.
    """
    found = {target: sources(_module_of(target)) for target in sorted(set(_targets(settings)))}
    return {target: code for target, code in found.items() if code}


@dataclass(frozen=True)
class _Source:
    """A module's file: its hash, the names that it imports, and whether it is installed rather than somebody's own.

    `spec` is that of the module as it was loaded, None if it was not.
    """

    spec: ModuleSpec | None
    digest: str
    imports: tuple[str, ...]
    installed: bool


_loaded: dict[str, _Source] = {}


def _read(module: str) -> _Source | None:
    in_use = sys.modules.get(module)
    spec = getattr(in_use, "__spec__", None)
    known = _loaded.get(module)
    if known is not None and in_use is not None and known.spec is spec:  # a reload gives a new one
        return known
    path, is_package = _file_of(module, in_use)
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError:
        return None
    imports: tuple[str, ...] = ()
    if path.suffix == ".py":
        package = module if is_package else module.rpartition(".")[0]
        try:
            imports = tuple(dict.fromkeys(_imports(ast.parse(content), package)))
        except (SyntaxError, ValueError):  # importing it says what is wrong
            imports = ()
    source = _Source(spec, hashlib.sha256(content).hexdigest(), imports, bool(_INSTALLED & set(path.parts)))
    if in_use is not None:
        _loaded[module] = source
    return source


def _file_of(module: str, in_use: object) -> tuple[Path | None, bool]:
    """A module's file, and whether it is a package's."""
    if in_use is not None:
        file = getattr(in_use, "__file__", None)
        return (None if file is None else Path(file)), hasattr(in_use, "__path__")
    spec = _find(module)
    if spec is None or not spec.has_location or spec.origin is None:
        return None, False
    return Path(spec.origin), spec.submodule_search_locations is not None


def _find(module: str) -> ModuleSpec | None:
    """The spec of a module, found without importing the packages around it."""
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # ValueError: a module that was loaded in an unusual way
        return None
    name = top
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = _inside(name, list(spec.submodule_search_locations))
    return spec


def _inside(name: str, folders: list[str]) -> ModuleSpec | None:
    """The spec of a module in a package's folders; a folder without `__init__.py` counts if there is nothing else."""
    found = [spec for folder in folders if (finder := get_importer(folder)) and (spec := finder.find_spec(name, None))]
    return next((spec for spec in found if spec.loader is not None), found[0] if found else None)


def _module_of(target: str) -> str:
    """The longest beginning of a dotted name that is a module: `mine.scale.Scale` -> `mine.scale`."""
    parts = target.split(".")
    for count in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:count])
        if is_foreign(name) and (name in sys.modules or _find(name) is not None):
            return name
    return parts[0]


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        target = node.get("_target_")
        if isinstance(target, str) and is_foreign(target):
            yield target
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for value in node:
            yield from _targets(value)


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Names of modules that a file imports; `from package import name` may mean a module, so it counts as one too."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                start = ".".join([*base, *([module] if module else [])])
                if start:
                    yield start
                    yield from (f"{start}.{alias.name}" for alias in names if alias.name != "*")
