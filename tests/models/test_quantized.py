"""Matrices in few bits: packing, what layers compute and save, and folders that are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from bs_exp.errors import ModelError
from bs_exp.evaluation.size import stored_bytes
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.linalg.quantization import fit_grid
from bs_exp.models.fingerprint import fingerprint
from bs_exp.models.modeling_basis_sharing import (
    BasisSharingConfig,
    Precision,
    Quantized,
    QuantizedLinear,
    pack_codes,
    packed_bytes,
    unpack_codes,
    unpacked,
)
from bs_exp.models.quantizing import (
    declare_precision,
    factorised_layer,
    packed,
    read_weight,
    reads,
    store_dense,
    store_factors,
)
from bs_exp.models.saving import save_model
from bs_exp.models.surgery import replace_matrices, to_dense, twin
from bs_exp.models.tiny import tiny_random
from bs_exp.protocols import Layout
from bs_exp.testing.layout import random_factors
from bs_exp.types import LoadedModel
from tests.models.test_saving import run_fresh
from tests.support.factorised import logits_of

Dense = Callable[[str], LoadedModel]
LAYOUTS = pytest.mark.parametrize("layout", [PlainLayout(), PivotedLayout()], ids=["plain", "pivoted"])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([3, 4, 8]), st.lists(st.integers(0, 255), max_size=40))
def test_codes_come_back_from_as_few_bytes_as_hold_them(bits: int, numbers: list[int]) -> None:
    codes = torch.tensor([number % 2**bits for number in numbers], dtype=torch.uint8)
    packed_codes = pack_codes(codes, bits)
    assert packed_codes.dtype is torch.uint8 and len(packed_codes) == packed_bytes(len(codes), bits)
    assert len(packed_codes) == -(-len(codes) * bits // 8)
    assert torch.equal(unpack_codes(packed_codes, len(codes), bits), codes)


def test_two_codes_share_a_byte_and_eight_of_three_bits_share_three() -> None:
    """The format of saved folders: the first code is in the lowest bits."""
    assert pack_codes(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]
    assert pack_codes(torch.tensor([1, 0, 0, 0, 0, 0, 0, 7], dtype=torch.uint8), 3).tolist() == [1, 0, 0xE0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(8, None, True), (4, 5, False), (3, 4, True)])
def test_a_layer_computes_with_what_the_grid_says(
    dtype: torch.dtype, bits: int, group_size: int | None, symmetric: bool
) -> None:
    """In the dtype of its scales, to the bit; 7 x 13 is odd, and 13 ends in a smaller group."""
    weight = torch.randn(7, 13, generator=torch.Generator().manual_seed(0))
    grid = fit_grid(weight, bits=bits, group_size=group_size, symmetric=symmetric, dtype=dtype)
    codes = grid.codes(weight)
    precision = Precision(bits, group_size, symmetric)
    found = unpacked(packed(codes, grid), precision)
    assert found.dtype is dtype and torch.equal(found.double(), grid.values(codes))
    bias = torch.nn.Parameter(torch.ones(7, dtype=dtype))
    layer = QuantizedLinear(packed(codes, grid), bias, precision, is_conv1d=False)
    x = torch.randn(3, 13, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, found, bias))
    assert not any(p.requires_grad for p in layer.numbers()) and (layer.in_features, layer.out_features) == (13, 7)


def quantized(
    dense: LoadedModel,
    layout: Layout,
    precision: Precision,
    *,
    correction: int = 0,
    factors: bool = True,
    every: bool = False,
) -> PreTrainedModel:
    """The model with random factors, rounded to the nearest; the matrices of one group in three stay dense, or none."""
    module = twin(dense.module)
    if factors:
        chosen = [f for i, f in enumerate(random_factors(dense.architecture, correction)) if i % 3 or every]
        replace_matrices(module, dense.architecture, iter(chosen), layout)
    bases: dict[int, Any] = {}
    alive, whole = [], []

    def rounded(weight: torch.Tensor) -> Any:
        grid = fit_grid(
            weight,
            bits=precision.bits,
            group_size=precision.group_size,
            symmetric=precision.symmetric,
            dtype=weight.dtype,
        )
        return packed(grid.codes(weight), grid)

    for matrix in dense.architecture.matrices:
        layer = factorised_layer(module, matrix.module)
        if layer is None:
            whole.append(matrix.module)
            store_dense(module, matrix.module, rounded(read_weight(module, matrix.module)), precision)
            continue
        alive.append(layer)  # or another one could get its id
        if id(layer.basis) not in bases:
            bases[id(layer.basis)] = rounded(layer.basis.detach())
        store_factors(module, matrix.module, bases[id(layer.basis)], rounded(layer.weight.detach()), precision)
    declare_precision(module, precision, whole, layout.name)
    return module


@LAYOUTS
@pytest.mark.parametrize(("family", "correction"), [("llama", 2), ("gpt2", 0), ("opt", 0)])
def test_corrections_biases_and_conv1d(
    dense: Dense, layout: Layout, family: str, correction: int, tmp_path: Path
) -> None:
    model = dense(family)
    module = quantized(model, layout, Precision(4, 5, False), correction=correction)
    expected = logits_of(module)
    save_model(module, model.tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(loaded), expected)
    assert stored_bytes(loaded) == stored_bytes(module) < 0.7 * stored_bytes(model.module)
    assert fingerprint(loaded) == fingerprint(module)
    whole = to_dense(loaded)
    assert not any(isinstance(part, Quantized) for part in whole.modules()) and not hasattr(whole, "hf_quantizer")
    torch.testing.assert_close(logits_of(whole), expected, rtol=1e-4, atol=1e-4)
    assert all(p.requires_grad for p in whole.parameters())
    half = loaded.half()  # scales follow, codes stay
    assert {p.dtype for p in half.parameters()} == {torch.float16, torch.int8, torch.uint8}
    torch.testing.assert_close(logits_of(half).float(), expected, rtol=0.05, atol=0.05)


def test_t5_whose_blocks_ask_for_the_dtype_of_a_weight(dense: Dense, tmp_path: Path) -> None:
    """It casts what it hands to `wo` to the dtype of its weight, but for int8."""
    model = dense("t5")
    module = quantized(model, PlainLayout(), Precision(8, None, True))
    ids = torch.arange(12).view(2, 6)
    expected = module(input_ids=ids, labels=ids).logits
    close = model.module(input_ids=ids, labels=ids).logits
    assert expected.isfinite().all() and not torch.equal(expected, close)
    save_model(module, model.tokenizer, tmp_path / "model")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(input_ids=ids, labels=ids).logits, expected)


def test_a_model_in_few_bits_is_pickled(dense: Dense, tmp_path: Path) -> None:
    module = quantized(dense("llama"), PivotedLayout(), Precision(4, 5, False))
    torch.save(module, tmp_path / "model.pt")
    code = "import sys, torch; torch.save(torch.load(sys.argv[1], weights_only=False).state_dict(), sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt", tmp_path / "state.pt"], check=True)
    state = torch.load(tmp_path / "state.pt")
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@LAYOUTS
def test_what_the_factors_read(dense: Dense, layout: Layout) -> None:
    """Oracle: what the layer gives to its maps as it runs."""
    module = twin(dense("llama").module)
    replace_matrices(module, dense("llama").architecture, random_factors(dense("llama").architecture), layout)
    for matrix in dense("llama").architecture.matrices:
        layer = factorised_layer(module, matrix.module)
        assert layer is not None
        x = torch.randn(9, matrix.d_in, dtype=torch.float64)
        seen = {}

        def note(name: str, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            seen[name] = inputs  # noqa: B023  read before the next layer
            return inputs @ weight.double().T

        layer.through(x, lambda z: note("basis", z, layer.basis), lambda z: note("weight", z, layer.weight))  # noqa: B023
        found = reads(layer, layer.basis.detach().double())
        torch.testing.assert_close(found.gram_of_basis(x.T @ x), seen["basis"].T @ seen["basis"])
        torch.testing.assert_close(found.gram_of_weight(x.T @ x), seen["weight"].T @ seen["weight"])


def test_fresh_process_without_bs_exp(dense: Dense, tmp_path: Path) -> None:
    """`trust_remote_code` gives the same bits; without it nothing is loaded, though dense int8 has as many numbers."""
    model = dense("llama")
    cases = {
        "factors": quantized(model, PivotedLayout(), Precision(3, None, True)),
        "dense": quantized(model, PlainLayout(), Precision(8, None, True), factors=False),
    }
    for name, module in cases.items():
        save_model(module, model.tokenizer, tmp_path / name)
    torch.save({name: logits_of(module) for name, module in cases.items()}, tmp_path / "logits.pt")
    found = run_fresh("load_quantized.py", tmp_path, "-I")
    assert found == {"refused": dict.fromkeys(cases, True), "equal": dict.fromkeys(cases, True)}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@LAYOUTS
@pytest.mark.parametrize("every", [True, False], ids=["factors", "some dense"])
def test_adapters_are_trained_beside_codes(dense: Dense, layout: Layout, every: bool, tmp_path: Path) -> None:
    """By peft's usual names, saved and loaded. Merged, they are terms of factorised layers; others have no room."""
    module = quantized(dense("llama"), layout, Precision(8, None, True), every=every)
    save_model(module, dense("llama").tokenizer, tmp_path / "model")
    ids = torch.arange(24).view(2, 12)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = get_peft_model(model, LoraConfig(target_modules=names, r=2))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert all(p.is_floating_point() for p in trained) and len(trained) == 2 * len(dense("llama").architecture.matrices)
    optimizer = torch.optim.SGD(trained, lr=1.0)
    adapted(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    expected = logits_of(adapted)
    assert not torch.equal(expected, logits_of(module))
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), expected)
    if not every:
        with pytest.raises(ValueError, match=r"stores its matrix in 8 bits.*to_dense"):
            loaded.merge_and_unload()
        return
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits_of(merged))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_random()
    module = quantized(model, PlainLayout(), Precision(4, None, False))
    return save_model(module, model.tokenizer, tmp_path_factory.mktemp("quantized") / "model")


@pytest.mark.parametrize("ending", ["weight", "weight_scale", "weight_zero", "basis", "basis_scale", "basis_zero"])
def test_every_tensor_must_be_there(folder: Path, ending: str, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].pop("crc32")
    tensors.pop(next(key for key in tensors if "layers.0" in key and key.endswith(f"_proj.{ending}")))
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"holds no tensor \S*\.{ending} that fits"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 5},
        {"bits": True},
        {"bits": "4"},
        {"group_size": 0},
        {"group_size": 1.5},
        {"symmetric": None},
        {"more": 1},
    ],
)
def test_a_precision_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    known = {"bits": 4, "group_size": 128, "symmetric": True}
    assert BasisSharingConfig(precision=known).stored_precision == Precision(**known)
    with pytest.raises(ValueError, match=r"quantization_config\.precision needs `bits` \(3, 4, 8\)"):
        BasisSharingConfig(precision={**known, **wrong})


def test_names_without_a_precision_are_refused() -> None:
    with pytest.raises(ValueError, match="precision must be set"):
        BasisSharingConfig(quantized=["a"])
    known = {"bits": 4, "group_size": None, "symmetric": True}
    for names, told in ((["a", "a"], "twice"), ("a", "list of module names")):
        with pytest.raises(ValueError, match=told):
            BasisSharingConfig(precision=known, quantized=names)


def test_only_what_is_there_can_be_stored(dense: Dense) -> None:
    module = quantized(dense("llama"), PlainLayout(), Precision(8, None, True), factors=False)
    name = dense("llama").architecture.matrices[0].module
    grid = fit_grid(torch.ones(2, 3), bits=8, group_size=None, symmetric=True, dtype=torch.float32)
    piece = packed(grid.codes(torch.ones(2, 3)), grid)
    with pytest.raises(ModelError, match="not a dense linear layer"):
        store_dense(module, name, piece, Precision(8, None, True))
    with pytest.raises(ModelError, match="not stored as factors"):
        store_factors(module, name, piece, piece, Precision(8, None, True))


def test_other_folders_have_the_configuration_that_they_always_had() -> None:
    """Older versions refuse keys that they do not know, and so a folder of few bits; all others they still load."""
    assert not {"precision", "quantized"} & BasisSharingConfig().to_dict().keys()
