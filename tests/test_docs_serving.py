"""The examples of docs/serving.md run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bs_exp import save_model
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.models.tiny import tiny_random
from tests.support.factorised import compressed_twin

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_every_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_random("llama")
    save_model(compressed_twin(dense, PivotedLayout()), dense.tokenizer, tmp_path / "OUT" / "model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) > 1
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert (tmp_path / "OUT" / "merged" / "model.safetensors").is_file()
