"""Run in a fresh process that cannot import bs_exp, on folders of matrices in few bits. Prints one JSON object."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.modules["bs_exp"] = None  # type: ignore[assignment]  # any import of it fails, as where it is not installed

folder = Path(sys.argv[1])
expected = torch.load(folder / "logits.pt")
ids = torch.arange(24).view(2, 12)


def refused(name: str) -> bool:
    try:
        AutoModelForCausalLM.from_pretrained(folder / name)
    except (RuntimeError, ValueError):
        return True
    return False


def equal(name: str) -> bool:
    model = AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True)
    with torch.no_grad():
        return torch.equal(model(ids).logits, expected[name])


# trust_remote_code registers the plug-in for the rest of the process, so these come first
refusals = {name: refused(name) for name in expected}
print(json.dumps({"refused": refusals, "equal": {name: equal(name) for name in expected}}))
