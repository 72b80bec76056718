"""The examples of docs/serving.md that load a model and put adapters on it run as they stand, one after the other."""

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
def test_loading_and_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_random("llama")
    save_model(compressed_twin(dense, PivotedLayout()), dense.tokenizer, tmp_path / "OUT" / "model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    wanted = [s for s in sections if s.startswith(("Load it\n", "Adapters\n"))]
    blocks = [block for s in wanted for block in re.findall(r"```python\n(.*?)```", s, flags=re.DOTALL)]
    assert len(wanted) == 2 and any("get_peft_model" in block for block in blocks)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert (tmp_path / "OUT" / "merged" / "model.safetensors").is_file()
