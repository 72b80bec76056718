"""The pivoted layout is the plain one without its redundancy: the same products, k^2 fewer numbers per group."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bs_exp import PivotedLinear, save_model, to_dense
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.linalg.decomposition import plain_form
from bs_exp.models import modeling_basis_sharing
from bs_exp.models.modeling_basis_sharing import pack_bits, unpack_bits
from bs_exp.models.tiny import FAMILIES
from bs_exp.types import LoadedModel, SharedFactors, WeightGroup
from tests.support.factorised import compressed_twin, logits_of, random_factors

Dense = Callable[[str], LoadedModel]
SOME = ["llama", "gpt2", "phi3", "opt"]


def factors(d_in: int, d_out: int, size: int, rank: int, seed: int = 0) -> SharedFactors:
    generator = torch.Generator().manual_seed(seed)
    group = WeightGroup("q", tuple(range(size)), d_in, d_out)
    basis = torch.randn(d_in, rank, generator=generator, dtype=torch.float64)
    coefficients = {i: torch.randn(rank, d_out, generator=generator, dtype=torch.float64) for i in group.layers}
    return SharedFactors(group, basis, coefficients)


@settings(max_examples=50, deadline=None)
@given(
    d_in=st.integers(2, 12), d_out=st.integers(1, 9), size=st.integers(1, 4), rank=st.integers(1, 12),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_product_is_the_same_and_the_identity_is_gone(
    d_in: int, d_out: int, size: int, rank: int, seed: int
) -> None:
    rank = min(rank, d_in, size * d_out)
    plain = factors(d_in, d_out, size, rank, seed)
    pivoted = PivotedLayout().arrange(plain)
    own = pivoted.pivots
    assert int(own.sum()) == rank and len(own) == (d_out if size == 1 else d_in)
    for layer in plain.group.layers:
        product = torch.empty(d_in, d_out, dtype=torch.float64)
        if size == 1:
            product[:, own] = pivoted.basis
            product[:, ~own] = pivoted.basis @ pivoted.coefficients[layer]
        else:
            product[own] = pivoted.coefficients[layer]
            product[~own] = pivoted.basis @ pivoted.coefficients[layer]
        torch.testing.assert_close(product, plain.basis @ plain.coefficients[layer], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [1, 2])
def test_no_pivot_is_far_from_the_best(size: int) -> None:
    """Oracle: exchanging a pivot with another feature changes the volume by the entry that is stored for the two."""
    pivoted = PivotedLayout().arrange(factors(60, 60, size, 30))
    others = pivoted.coefficients[0] if size == 1 else pivoted.basis
    assert float(others.abs().max()) < 3.0


def test_which_pivots_does_not_depend_on_how_the_product_is_written() -> None:
    plain = factors(20, 9, 2, 7)
    change = torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    changed = replace(
        plain,
        basis=plain.basis @ change,
        coefficients={layer: torch.linalg.solve(change, c) for layer, c in plain.coefficients.items()},
    )
    first, second = PivotedLayout().arrange(plain), PivotedLayout().arrange(changed)
    assert torch.equal(first.pivots, second.pivots)
    torch.testing.assert_close(first.basis, second.basis)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("independent", [0, 1, 3])
def test_products_of_lower_rank(independent: int, size: int) -> None:
    """Such as a matrix of zeros, with which blocks are added to a trained model."""
    plain = factors(6, 5, size, 4)
    whole = {layer: c * (torch.arange(4) < independent)[:, None] for layer, c in plain.coefficients.items()}
    pivoted = PivotedLayout().arrange(replace(plain, coefficients=whole))
    again = plain_form(pivoted)
    for layer, coefficients in whole.items():
        torch.testing.assert_close(again.basis @ again.coefficients[layer], plain.basis @ coefficients)


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
