"""`bs-exp export --to onnx`: the same outputs in onnxruntime, from both factors, with a shared basis there once."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bs_exp import save_model
from bs_exp.errors import ConfigError, ModelError
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.loading import assemble
from bs_exp.models.modeling_basis_sharing import FactorisedLinear
from bs_exp.models.tiny import TinyRandom, byte_tokenizer
from bs_exp.protocols import Layout
from bs_exp.serving import onnx_export
from bs_exp.serving.onnx_export import export_onnx
from tests.support.factorised import compressed_twin

LENGTHS = ((1, 1), (1, 9), (3, 40))


# Wider than the tensors that the exporter keeps from being there twice by itself (1,024 numbers).
WIDE = LlamaConfig(
    hidden_size=288, num_attention_heads=4, num_hidden_layers=2, intermediate_size=320, vocab_size=258, eos_token_id=0
)


def saved(folder: Path, family: str, layout: Layout) -> Path:
    dense = TinyRandom(family=family, layers=2).load()
    return save_model(compressed_twin(dense, layout), dense.tokenizer, folder)


def saved_wide(folder: Path, layout: Layout) -> Path:
    torch.manual_seed(0)
    dense = assemble(LlamaForCausalLM(WIDE), byte_tokenizer(), None, source="test", name="wide")
    return save_model(compressed_twin(dense, layout), dense.tokenizer, folder)


def outputs(folder: Path, ids: Tensor, mask: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    return torch.from_numpy(found)


def assert_same_logits(folder: Path, model: Any) -> None:
    for batch, length in LENGTHS:
        ids = torch.randint(250, (batch, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[:, : length // 4] = 0  # padding on the left
        with torch.no_grad():
            wanted = model(input_ids=ids, attention_mask=mask).logits
        read = mask.bool()
        torch.testing.assert_close(outputs(folder, ids, mask)[read], wanted[read], rtol=1e-4, atol=1e-4)


def stored(folder: Path) -> list[np.ndarray]:
    """The tensors of the file with two sides; constants inside of the graph are none of the model's."""
    graph = onnx.load(folder / "model.onnx").graph
    return [array for array in map(numpy_helper.to_array, graph.initializer) if array.ndim == 2]


def times(arrays: list[np.ndarray], wanted: Tensor) -> int:
    """How often a matrix is stored, either way round."""
    one, other = wanted.detach().numpy(), wanted.detach().numpy().T
    return sum(any(a.shape == w.shape and np.array_equal(a, w) for w in (one, other)) for a in arrays)


def assert_factors_are_stored_once(folder: Path, model: Any) -> None:
    layers = [module for module in model.modules() if isinstance(module, FactorisedLinear)]
    bases = {id(layer.basis): layer.basis for layer in layers}
    assert len(bases) < len(layers)  # some are shared
    arrays = stored(folder)
    assert [times(arrays, basis) for basis in bases.values()] == [1] * len(bases)
    assert [times(arrays, layer.weight) for layer in layers] == [1] * len(layers)
    assert not any(times(arrays, layer.product()) for layer in layers)


def test_a_decoder_through_the_command(cli: Callable[..., Any], tmp_path: Path) -> None:
    """Plain layout, pairs with one basis; what is said of the file, and what lies beside it."""
    folder = saved_wide(tmp_path / "model", PlainLayout())
    done = cli("export", "model", "--to", "onnx")
    assert done.status == 0, done.err
    *facts, place = done.out.splitlines()
    out = Path(place)
    assert out == tmp_path / "model-onnx"
    size = (out / "model.onnx").stat().st_size
    assert facts[0].split() == ["size", f"{size / 2**20:.2f}", "MiB"]
    assert "logits, float32, without a cache of keys and values" in facts[1] and "differ by" in facts[2]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_logits(out, model)
    assert_factors_are_stored_once(out, model)
    # No more than the weights and the graph: nothing of this machine's source code is in the file.
    assert str(Path(torch.__file__).parent).encode() not in (out / "model.onnx").read_bytes()
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(folder))
    again = cli("export", "model", "--to", "onnx")
    assert again.status == 1 and "exists already. Name another folder with --out." in again.err


def test_the_pivoted_layout(tmp_path: Path) -> None:
    folder = saved_wide(tmp_path / "model", PivotedLayout())
    export_onnx(folder, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_logits(tmp_path / "out", model)
    assert_factors_are_stored_once(tmp_path / "out", model)
    # Another model's outputs are not taken for this one's.
    other = LlamaForCausalLM(WIDE).eval()
    with pytest.raises(ModelError, match="gives other outputs in onnxruntime than the model does: they differ by"):
        onnx_export._compare(other, "logits", tmp_path / "out" / "model.onnx")


def test_an_encoder_with_its_weights_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are of models above 1.5 GiB."""
    monkeypatch.setattr(onnx_export, "_MOST_INSIDE", 0)
    folder = saved(tmp_path / "model", "bert", PlainLayout())
    done = export_onnx(folder, tmp_path / "out")
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert done.bytes == files["model.onnx"] + files["model.onnx.data"]
    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert files["model.onnx.data"] >= sum(p.nbytes for p in model.parameters()) * 0.9
    assert_same_logits(tmp_path / "out", model)
    assert "cache" not in onnx_export.settings_of(done)["graph"]


@pytest.mark.slow  # the exporter's own work until it fails
def test_what_the_exporter_cannot_say_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "mixtral", PlainLayout())
    with pytest.raises(ModelError, match=r"exporter cannot say this MixtralForCausalLM in ONNX: No .* Use --to dense"):
        export_onnx(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_what_has_no_such_file_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    TinyRandom(family="t5", layers=2).load().module.config.save_pretrained(folder)  # a configuration, and no weights
    with pytest.raises(ModelError, match=r"is an encoder-decoder \(t5\), .* Use --to dense"):
        export_onnx(folder, tmp_path / "out")
    mixture = TinyRandom(family="mixtral", layers=2).load().module.config
    mixture.quantization_config = {
        "quant_method": "basis_sharing",
        "groups": [],
        "experts": ["model.layers.0.mlp.experts"],
    }
    mixture.save_pretrained(tmp_path / "mixture")
    with pytest.raises(ModelError, match=r"holds routed experts \(mixtral\), .* Use --to dense"):
        export_onnx(tmp_path / "mixture", tmp_path / "out")
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else known(name))
    with pytest.raises(ConfigError, match=r"needs onnxscript, which is not installed: pip install 'bs-exp\[onnx\]'"):
        export_onnx(folder, tmp_path / "out")
