"""Low-rank compression of language models by sharing bases between layers.

Importing the package registers its plug-in with Transformers, so that `from_pretrained` loads compressed models. It
imports neither torch nor Transformers: names are looked up, and the plug-in is registered, when they are needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import bs_exp_autoload

if TYPE_CHECKING:
    from bs_exp.api import Compression, compress, evaluate, load, strategy
    from bs_exp.models.modeling_basis_sharing import PivotedLinear, SharedLinear
    from bs_exp.models.saving import save_model
    from bs_exp.models.surgery import to_dense

__all__ = [
    "Compression",
    "PivotedLinear",
    "SharedLinear",
    "compress",
    "evaluate",
    "load",
    "save_model",
    "strategy",
    "to_dense",
]

_HOMES = {
    **dict.fromkeys(("Compression", "compress", "evaluate", "load", "strategy"), "bs_exp.api"),
    "PivotedLinear": "bs_exp.models.modeling_basis_sharing",
    "SharedLinear": "bs_exp.models.modeling_basis_sharing",
    "save_model": "bs_exp.models.saving",
    "to_dense": "bs_exp.models.surgery",
}

bs_exp_autoload.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
