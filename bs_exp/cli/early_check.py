"""Settings, checked by the constructors that take them, before torch and its like are imported.

A constructor's checks need no tensors, but the file that they stand in imports them. Here these files are run a second
time, as modules of their own, with stand-ins for the libraries: what a constructor refuses without touching a stand-in
it refuses in earnest, in its own words; where it touches one, nothing is known yet, and the run will tell.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bs_exp.errors import BsExpError, ConfigError

_PACKAGE, _TWIN = "bs_exp", "bs_exp_unloaded"
_TARGET = "_target_"
# What is small enough to be imported as it is; of these two the classes and functions are those of everybody.
_LIGHT = frozenset({*sys.stdlib_module_names, "hydra", "omegaconf", "yaml"})
_OWN = frozenset({"bs_exp.errors", "bs_exp.validation"})


class _NeededError(NameError):
    """A check needs a library that is not imported."""


class _Absent:
    """Stands for a library and for all that is in it.

    While modules are loaded it can be named, called (decorators) and inherited from; what plain data would be made from
    it, and later any use at all, raises _NeededError.
    """

    def __init__(self, twins: _Twins) -> None:
        object.__setattr__(self, "_twins", twins)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()

    def __hash__(self) -> int:
        return id(self)

    # Types in annotations: Tensor | None, Float[Tensor, "d d"].
    def __or__(self, other: Any) -> _Absent:
        return self

    __ror__ = __getitem__ = __or__


def _named(self: _Absent, *arguments: Any, **named: Any) -> Any:
    if not object.__getattribute__(self, "_twins").loading:
        raise _NeededError("a library that is not imported yet")
    return self


def _used(self: _Absent, *arguments: Any, **named: Any) -> Any:
    raise _NeededError("a library that is not imported yet")


for _name in ("getattr", "call", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "neg"):
    setattr(_Absent, f"__{_name}__", _named)
for _name in ("iter", "len", "contains", "bool", "eq", "ne", "lt", "le", "gt", "ge", "str", "repr", "format", "float"):
    setattr(_Absent, f"__{_name}__", _used)
for _name in ("int", "index", "instancecheck", "subclasscheck", "enter", "exit"):
    setattr(_Absent, f"__{_name}__", _used)


class _Twins:
    """Second copies of the package's modules, under a name of their own, which import no library."""

    def __init__(self) -> None:
        self.loading = True
        self.absent = _Absent(self)
        self._failed: set[str] = set()
        self._builtins = {**vars(builtins), "__import__": self._import}

    def module(self, name: str) -> ModuleType:
        """The copy of a module of the package, run once; ModuleNotFoundError if there is none."""
        if name in _OWN:
            return sys.modules[name]
        twin = name.replace(_PACKAGE, _TWIN, 1)
        if twin in sys.modules:
            return sys.modules[twin]
        parent, _, last = name.rpartition(".")
        spec = find_spec(name)
        loader: Any = spec and spec.loader
        if loader is None:
            raise ModuleNotFoundError(name)
        made = ModuleType(twin)
        vars(made).update(__builtins__=self._builtins, __file__=spec and spec.origin)
        sys.modules[twin] = made
        if parent:  # the package itself only registers its plug-in with Transformers
            setattr(self.module(parent), last, made)
            exec(loader.get_code(name), vars(made))
        return made

    def find(self, name: str) -> Any:
        """The copy of a module, or what stands for it where it computes with a library while it is loaded."""
        if name not in self._failed:
            try:
                return self.module(name)
            except ModuleNotFoundError:
                raise
            except Exception:  # whatever goes wrong in code without its libraries says nothing of the settings
                self._failed.add(name)
        return self.absent

    def _import(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        if name.split(".")[0] == _PACKAGE and fromlist:
            module = self.find(name)
            for item in fromlist:
                if module is not self.absent and not hasattr(module, item):
                    setattr(module, item, self.find(f"{name}.{item}"))
            return module
        if name.split(".")[0] in _LIGHT:
            return __import__(name, globals, locals, fromlist or (), level)
        return self.absent


@contextmanager
def _twins() -> Iterator[_Twins]:
    before = {name for name in sys.modules if name.split(".")[0] == _TWIN}
    try:
        yield _Twins()
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == _TWIN and name not in before]:
            del sys.modules[name]


def check_early(cfg: DictConfig) -> None:
    """ConfigError for what a constructor of the package refuses; nothing where that cannot be known without torch.

    Settings of the root have been checked.
    """
    with early_checks() as check:
        check(cfg)


@contextmanager
def early_checks() -> Iterator[Callable[[DictConfig], None]]:
    """`check_early` for many configurations, such as the points of a sweep; settings in common are looked at once."""
    with _twins() as twins:
        yield _EarlyChecks(twins).check


@dataclass(frozen=True)
class _EarlyChecks:
    """Looks at every strategy of a configuration; `found` remembers what was said of a key's settings."""

    twins: _Twins
    found: dict[tuple[str, str], ConfigError | None] = field(default_factory=dict)

    def check(self, cfg: DictConfig) -> None:
        from bs_exp.cli.config import maker, strategy_keys
        from bs_exp.cli.dials import with_dials

        renamed: set[str] = set()
        own = OmegaConf.create(_renamed(OmegaConf.to_container(cfg, resolve=False), renamed))
        assert isinstance(own, DictConfig)
        self.twins.loading = True
        unknown = {target.replace(_PACKAGE, _TWIN, 1) for target in sorted(renamed) if not self._is_known(target)}
        filled = with_dials(own)  # asks the classes, which are loaded now, what they take
        self.twins.loading = False
        make: Callable[[str], Any] | None = None
        for key in strategy_keys(own):
            node = OmegaConf.select(filled, key)
            if not (targets := set(_targets(node))) or any(t in unknown or not _is_twin(t) for t in targets):
                continue
            same = (key, repr(OmegaConf.to_container(node, resolve=True)))
            if same not in self.found:
                make = make or maker(own)
                self.found[same] = _refusal(make, key)
            if (refused := self.found[same]) is not None:
                raise refused

    def _is_known(self, target: str) -> bool:
        try:
            return self.twins.find(target.rpartition(".")[0]) is not self.twins.absent
        except ImportError:
            return False


def _refusal(make: Callable[[str], Any], key: str) -> ConfigError | None:
    try:
        make(key)
    except (BsExpError, InstantiationException, OmegaConfBaseException, _NeededError) as error:
        if isinstance(error, BsExpError) and not _needed_a_library(error):
            return ConfigError(str(error).replace(f"{_TWIN}.", f"{_PACKAGE}."))
    return None


def _renamed(node: Any, found: set[str]) -> Any:
    """Plain data with the package's targets under the name of their copies; `found` gets the targets."""
    if isinstance(node, dict):
        target = node.get(_TARGET)
        if isinstance(target, str) and target.startswith(f"{_PACKAGE}."):
            found.add(target)
            node = {**node, _TARGET: target.replace(_PACKAGE, _TWIN, 1)}
        return {name: _renamed(inner, found) for name, inner in node.items()}
    return [_renamed(inner, found) for inner in node] if isinstance(node, list) else node


def _targets(node: Any) -> Iterator[str]:
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if isinstance(plain, dict):
        if isinstance(plain.get(_TARGET), str):
            yield plain[_TARGET]
        for inner in plain.values():
            yield from _targets(inner)
    elif isinstance(plain, list):
        for inner in plain:
            yield from _targets(inner)


def _is_twin(target: str) -> bool:
    return target.startswith(f"{_TWIN}.")


def _needed_a_library(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, _NeededError):
            return True
        error = error.__cause__ or error.__context__
    return False
