"""Run in a fresh process, with bs_exp or where it is not installed: whether saved models say what they said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

folder, with_bs_exp = Path(sys.argv[1]), bool(int(sys.argv[2]))
if with_bs_exp:
    import bs_exp  # noqa: F401
else:
    sys.modules["bs_exp"] = None  # type: ignore[assignment]  # any import of it fails

seen: dict[str, bool] = {}
for path, expected in torch.load(folder / "expected.pt").items():
    trusted = {} if with_bs_exp or path.endswith("dense") else {"trust_remote_code": True}
    model = getattr(transformers, expected["auto"]).from_pretrained(folder / path, **trusted)
    with torch.no_grad():
        seen[path] = torch.equal(model(**expected["inputs"])[0], expected["output"])
print(json.dumps(seen))
