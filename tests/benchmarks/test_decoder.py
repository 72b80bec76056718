"""The whole-model benchmark compares models that read and write the same, with the parameters that it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from bs_exp.benchmarks.decoder import DenseRearranged, dense_rearranged, main, variants
from bs_exp.models import modeling_basis_sharing
from bs_exp.models.modeling_basis_sharing import (
    FactorisedLinear,
    PivotedInputLinear,
    PivotedLinear,
    PivotedOutputLinear,
    SharedLinear,
)

_SMALL = "--hidden 32 --intermediate 48 --heads 4 --blocks 2 --device cpu"


@pytest.mark.parametrize(("group", "pivoted"), [(1, PivotedOutputLinear), (2, PivotedInputLinear)])
def test_every_matrix_of_the_blocks_is_factorised(group: int, pivoted: type[PivotedLinear]) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2, vocab_size=40
    )
    dense, *others = variants(config, 0.7, dtype=torch.float32, device=torch.device("cpu"), group=group)
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert dense.multiply_adds == matrices + 40 * 32
    rest = dense.parameters - matrices
    for variant, kind in zip(others, (SharedLinear, pivoted, pivoted), strict=True):
        layers = [m for m in variant.module.modules() if isinstance(m, FactorisedLinear)]
        assert len(layers) == 14 and all(type(layer) is kind for layer in layers)
        assert len({id(layer.basis) for layer in layers}) == 14 // group
        assert sum(type(m) is nn.Linear for m in variant.module.modules()) == 1  # the head
        held = sum(p.numel() for p in variant.module.parameters())
        # The rest of what counts as stored are the pivots.
        assert held <= variant.parameters <= rest + matrices
        assert variant.multiply_adds == sum(layer.basis.numel() + layer.weight.numel() for layer in layers) + 40 * 32
    plain, same_budget, same_rank = others
    assert plain.parameters <= rest + 0.7 * matrices >= same_budget.parameters
    assert same_rank.parameters < same_budget.parameters


@pytest.mark.parametrize("group", [2, 3])
def test_blocks_left_over_are_a_smaller_group(group: int) -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=4, vocab_size=9)
    _, plain, *_ = variants(config, 0.7, dtype=torch.float32, device=torch.device("cpu"), group=group)
    bases = [plain.module.get_submodule(f"model.layers.{i}.mlp.up_proj").basis for i in range(4)]
    assert [id(basis) for basis in bases] == [id(bases[i // group * group]) for i in range(4)]


def test_a_rearranged_dense_model_is_compared_where_factors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2, vocab_size=9)
    dense, *_ = variants(config, 0.7, dtype=torch.float32, device=torch.device("cpu"))
    assert dense_rearranged(dense) == ()
    monkeypatch.setattr(modeling_basis_sharing, "LEAST_NUMBERS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    (other,) = dense_rearranged(dense)
    assert sum(isinstance(module, DenseRearranged) for module in other.module.modules()) == 14
    assert {id(p) for p in other.module.parameters()} == {id(p) for p in dense.module.parameters()}
    ids = torch.arange(5)[None]
    with torch.no_grad():
        torch.testing.assert_close(other.module(ids).logits, dense.module(ids).logits, rtol=1e-4, atol=1e-6)


def test_the_command_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "decoder.json"
    lengths = "--prompt-length 4 --generated-length 2 --rounds 2 --batch 3"
    main([*_SMALL.split(), *lengths.split(), "--json", str(file)])
    record = json.loads(file.read_text())
    assert [m["case"] for m in record["measurements"]] == ["read 3 x 4"] * 4 + ["write 3 x 1"] * 4
    assert all(0 < m["fastest"] <= m["median"] <= m["slowest"] for m in record["measurements"])
    assert record["settings"]["prompt_length"] == 4
    assert "pivoted, same rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        "--ratio 0",
        "--blocks 0",
        "--vocabulary 0",
        "--multiple 64",
        "--group 0",
        "--heads 5",
        "--heads 32",
        "--device nowhere",
    ],
)
def test_bad_arguments(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*_SMALL.split(), *arguments.split()])
    assert "error:" in capsys.readouterr().err
