"""Folders written when format version 2 was new go on loading, to the logits that they had then.

They hold a Llama of two layers, hidden size 8, with random factors: pairs that share, and `o` alone. The `residual`
ones have a correction of rank 1 for q and up.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

CHECKPOINTS = Path(__file__).parents[1] / "support" / "checkpoints"
NAMES = ["plain", "pivoted", "plain_residual", "pivoted_residual"]


@pytest.mark.parametrize("name", NAMES)
def test_an_old_folder_loads_to_the_same_logits(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name)
    with torch.no_grad():
        logits = model(torch.arange(24).view(2, 12)).logits
    expected = load_file(CHECKPOINTS / name / "logits.safetensors")["logits"]
    # Logits are about 0.2: this is rounding in fp32, which differs between processors.
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("name", NAMES)
def test_all_its_tensors_are_in_the_model(name: str) -> None:
    state = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name).state_dict()
    for key, value in load_file(CHECKPOINTS / name / "model.safetensors").items():
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_saved_again_it_is_the_same_file(name: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name).save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (CHECKPOINTS / name, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
