"""Makes Transformers know models with shared bases as soon as it is imported, without `import bs_exp`.

Transformers has no entry point for quantization plug-ins, so an import hook takes its place: right after the module
that holds the table of quantizers was executed, `bs_exp.models.modeling_basis_sharing` is imported, which adds its own.
An installation puts this file and the line in `bs_exp_autoload.pth` beside the package; Python runs that line whenever
it starts. Nothing is imported by it: neither torch nor Transformers nor `bs_exp` before something else imports
Transformers' quantizers. A module of its own, for the same reason: `bs_exp` must not be imported before a program says
which one.

Nothing here may stop a Python that has nothing to do with `bs_exp`: where the package is gone, nothing happens, and
where it cannot be imported, whatever the error, a line on stderr says why.
"""

from __future__ import annotations

import sys

# `typing` and `importlib.abc` would be most of what a start of Python pays for this file.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

TRIGGER = "transformers.quantizers.auto"
PACKAGE = "bs_exp"
PLUGIN = f"{PACKAGE}.models.modeling_basis_sharing"


def install() -> None:
    """From now on, Transformers' table of quantizers includes the one of this package; at once if it exists already."""
    if TRIGGER in sys.modules:
        _import_plugin()
    elif not any(isinstance(finder, PluginFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PluginFinder())


class PluginFinder:
    """Finds one module, as the other finders do, and has the plug-in imported after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = next(filter(None, (f.find_spec(fullname, path, target) for f in sys.meta_path)), None)
        if spec is not None and spec.loader is not None:
            _import_plugin_after(spec.loader)
        return spec


def _import_plugin_after(loader: Loader) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        try:
            execute(module)
            _import_plugin()
        except BaseException:  # such as Ctrl-C: the import fails, and its next try must find the hook again
            sys.meta_path.insert(0, PluginFinder())
            raise

    # On the instance, which loads this module only: it stays the loader that others know how to ask for the source.
    loader.exec_module = exec_module  # type: ignore[method-assign]


def _import_plugin() -> None:
    try:
        __import__(PLUGIN)
    except Exception as error:  # whatever it is: the program that imports Transformers has nothing to do with it
        # An environment from which the package was removed by hand; a dependency that is missing is another matter.
        gone = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == PACKAGE
        if not gone:
            # Not a warning: with `-W error` that would be raised.
            sys.stderr.write(
                "bs_exp: models that it compressed cannot be loaded here, since "
                f"{PLUGIN} cannot be imported ({type(error).__name__}: {error}).\n"
            )
