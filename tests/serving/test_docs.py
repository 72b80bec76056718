"""docs/serving.md: the page's Python as it stands, on tiny models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bs_exp import save_model
from bs_exp.models.tiny import tiny_random
from tests.support.factorised import compressed_twin

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_a_draft_writes_the_dense_models_own_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = PAGE.partition("## As a draft")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    model = tiny_random("llama")
    monkeypatch.chdir(tmp_path)
    save_model(model.module, model.tokenizer, "DIR")
    save_model(compressed_twin(model), model.tokenizer, "OUT/model")
    found: dict[str, object] = {}
    exec(code, found)
    prompt = model.tokenizer("Return the", return_tensors="pt")
    with torch.no_grad():
        alone = model.module.generate(**prompt, do_sample=False, max_new_tokens=40)
    assert found["text"] == model.tokenizer.decode(alone[0])
