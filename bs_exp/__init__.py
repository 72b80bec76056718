"""Low-rank compression of language models by sharing bases between layers.

Importing the package registers its plug-in with Transformers, so that `from_pretrained` loads compressed models.
"""

from __future__ import annotations

from bs_exp.hf_plugin import PivotedLinear, SharedLinear
from bs_exp.replacement import to_dense
from bs_exp.saving import save_model

__all__ = ["PivotedLinear", "SharedLinear", "save_model", "to_dense"]
