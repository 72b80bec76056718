"""The pivoted layout is the plain one without its redundancy: the same products, k^2 fewer numbers per group."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bs_exp import PivotedLinear, save_model, to_dense
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.models import modeling_basis_sharing
from bs_exp.models.modeling_basis_sharing import pack_bits, unpack_bits
from bs_exp.models.tiny import FAMILIES
from bs_exp.types import LoadedModel
from tests.support.factorised import compressed_twin, logits_of, random_factors

Dense = Callable[[str], LoadedModel]
SOME = ["llama", "gpt2", "phi3", "opt"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_with_the_plain_layout(dense: Dense, family: str) -> None:
    plain = logits_of(compressed_twin(dense(family)))
    pivoted = logits_of(compressed_twin(dense(family), PivotedLayout()))
    assert float((pivoted - plain).norm() / plain.norm()) < 1e-4


@pytest.mark.parametrize("family", SOME)
def test_exactly_k_squared_numbers_fewer_are_stored(dense: Dense, family: str) -> None:
    plain = compressed_twin(dense(family)).num_parameters()
    pivoted = compressed_twin(dense(family), PivotedLayout()).num_parameters()
    assert plain - pivoted == sum(shared.rank**2 for shared in random_factors(dense(family).architecture))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 64, 77])
def test_bits_survive_packing(length: int) -> None:
    bits = torch.rand(length, generator=torch.Generator().manual_seed(length)) < 0.4
    packed = pack_bits(bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-length // 8)
    assert torch.equal(unpack_bits(packed, length), bits)


@pytest.mark.parametrize("family", SOME)
def test_dense_export_has_the_same_logits(dense: Dense, family: str) -> None:
    model = compressed_twin(dense(family), PivotedLayout())
    torch.testing.assert_close(logits_of(to_dense(model)), logits_of(model), rtol=1e-4, atol=5e-5)


@pytest.fixture(scope="module")
def saved(dense: Dense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, logits = tmp_path_factory.mktemp("pivoted"), {}
    for family in FAMILIES:
        model = compressed_twin(dense(family), PivotedLayout())
        save_model(model, dense(family).tokenizer, folder / "compressed" / family)
        logits[family] = logits_of(model)
    torch.save({"compressed": logits}, folder / "logits.pt")
    return folder


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_logits_bit_for_bit(dense: Dense, saved: Path) -> None:
    script = Path(__file__).parents[1] / "support" / "load_with_plugin.py"
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(modeling_basis_sharing.__file__).parents[2]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    done = subprocess.run(
        [sys.executable, str(script), str(saved)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    for family in FAMILIES:
        architecture = dense(family).architecture
        assert seen[family]["equal"] and seen[family]["generated"] == 3, family
        assert seen[family]["layers"] == len(architecture.matrices)
        assert seen[family]["bases"] == len(list(random_factors(architecture)))


@pytest.mark.parametrize(
    ("rank", "message"), [(1, "pivot bits|mismatch"), (100_000, "above what layers of .* have pivots for")]
)
def test_a_wrong_rank_is_refused(saved: Path, tmp_path: Path, rank: int, message: str) -> None:
    config = json.loads((saved / "compressed" / "llama" / "config.json").read_text())
    config["quantization_config"]["groups"][0]["rank"] = rank
    for file in (saved / "compressed" / "llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_pivots_that_differ_between_layers_of_one_basis_are_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "compressed" / "llama", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.q_proj.pivots"
    tensors[name] = pack_bits(unpack_bits(tensors[name], 8 * len(tensors[name])).flip(0))
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.* share a basis, but their `pivots` differ"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_bits_lie_in_the_file_and_the_order_does_not(saved: Path) -> None:
    with safe_open(saved / "compressed" / "llama" / "model.safetensors", framework="pt") as file:
        names: list[str] = list(file.keys())
    assert any(name.endswith(".pivots") for name in names) and not any(name.endswith("_features") for name in names)


def test_copies_dtypes_state_dicts_and_gradients(dense: Dense) -> None:
    model = compressed_twin(dense("llama"), PivotedLayout())
    expected = logits_of(model)
    assert torch.equal(logits_of(copy.deepcopy(model)), expected)
    other = compressed_twin(dense("llama"), PivotedLayout())
    with torch.no_grad():
        for layer in other.modules():
            if isinstance(layer, PivotedLinear):
                layer.pivots.copy_(pack_bits(layer.is_pivot.flip(0)))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(other), expected)
    half = copy.deepcopy(model).bfloat16()
    assert float((logits_of(half).float() - expected).norm() / expected.norm()) < 0.05
    model(torch.arange(12)[None]).logits.square().sum().backward()
    for layer in model.modules():
        if isinstance(layer, PivotedLinear):
            assert layer.basis.grad is not None and bool((layer.basis.grad != 0).any())


def test_compiles_into_one_graph(dense: Dense) -> None:
    model = compressed_twin(dense("llama"), PivotedLayout())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
