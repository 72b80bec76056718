"""vLLM serves saved models as Transformers runs them. In an environment of its own: `make test-vllm`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import bs_exp
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.loading import assemble
from bs_exp.models.surgery import replace_matrices, twin
from bs_exp.models.tiny import byte_tokenizer
from tests.support.factorised import random_factors

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
DEMO = ROOT / "bs_exp" / "demo" / "model"
TOKENS = 12
PRESETS = ("svd_llm", "basis_sharing", "best")
LAYOUTS = {"plain": PlainLayout, "pivoted": PivotedLayout}
# vLLM's attention on CPUs wants heads of 32.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96},
    "qwen2": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96},
    "gpt2": {"n_embd": 64, "n_head": 2, "n_layer": 3},
}


@dataclass(frozen=True)
class Served:
    """What vLLM answered, and what its model holds."""

    answers: list[dict[str, Any]]
    holders: list[list[str]]
    stored: int


def _run(code: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, *code], env=env, capture_output=True, text=True, check=False)


def _serve(folder: Path, **settings: Any) -> Served:
    wanted = {"prompts": _prompts(folder), "tokens": TOKENS, "settings": {"enforce_eager": True, **settings}}
    ended = _run(["-m", "tests.support.serve_with_vllm", str(folder), json.dumps(wanted)])
    assert ended.returncode == 0, ended.stderr[-6000:]
    return Served(**json.loads(ended.stdout.splitlines()[-1]))


def _prompts(folder: Path) -> list[list[int]]:
    size = AutoConfig.from_pretrained(folder).vocab_size
    random = torch.Generator().manual_seed(0)
    return [torch.randint(3, size, (length,), generator=random).tolist() for length in (2, 17, 60)]


@torch.no_grad()
def _compare(folder: Path, served: Served, dtype: torch.dtype, tolerance: float) -> None:
    """Log-probabilities of the prompts within a tolerance of those of Transformers; in fp32, the same greedy tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for prompt, answer in zip(_prompts(folder), served.answers, strict=True):
        ids = torch.tensor([prompt])
        known = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer["logprobs"]), known, rtol=0, atol=tolerance)
        if dtype == torch.float32:
            whole = model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
            assert answer["tokens"] == whole[0, len(prompt) :].tolist()


def _stored_in(folder: Path) -> int:
    """How many numbers the factors of a folder have."""
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["groups"]
    members = {name for group in groups for name in group["members"]}
    tensors = load_file(folder / "model.safetensors")
    return sum(
        tensor.numel()
        for name, tensor in tensors.items()
        if name.rpartition(".")[0] in members and name.rpartition(".")[2] in ("basis", "weight")
    )


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The demo model, compressed by a preset on a few windows and saved."""
    root = tmp_path_factory.mktemp("compressed")

    def folder(preset: str) -> Path:
        if not (root / preset).exists():
            windows = ["calibration.num_sequences=8", "calibration.sequence_length=128"]
            made = bs_exp.compress(DEMO, preset=preset, retain_ratio=0.6, overrides=windows, quiet=True)
            made.save(root / preset)
        return root / preset

    return folder


@pytest.mark.parametrize("preset", PRESETS)
def test_a_compressed_model_answers_as_in_transformers(preset: str, compressed: Callable[[str], Path]) -> None:
    folder = compressed(preset)
    served = _serve(folder, dtype="float32")
    _compare(folder, served, torch.float32, 1e-4)
    assert served.stored == _stored_in(folder)


def test_a_basis_is_one_object_in_all_its_layers(compressed: Callable[[str], Path]) -> None:
    folder = compressed("basis_sharing")
    served = _serve(folder, dtype="float32")
    # q, k and v of two blocks are one stacked basis; o and down are not shared in the paper.
    assert ["model.layers.0.self_attn.qkv_proj", "model.layers.1.self_attn.qkv_proj"] in served.holders
    assert ["model.layers.6.mlp.gate_up_proj", "model.layers.7.mlp.gate_up_proj"] in served.holders
    assert served.stored == _stored_in(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, compressed: Callable[[str], Path]) -> None:
    folder = compressed("best")
    _compare(folder, _serve(folder, dtype=dtype), getattr(torch, dtype), 0.15 if dtype == "bfloat16" else 0.03)


def test_compiled(compressed: Callable[[str], Path]) -> None:
    """Without `enforce_eager`, as servers run: the model is compiled."""
    folder = compressed("basis_sharing")
    _compare(folder, _serve(folder, dtype="float32", enforce_eager=False), torch.float32, 1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_biases_fused_matrices_and_dense_parts(family: str, layout: str, tmp_path: Path) -> None:
    """Groups of two blocks, with one left over; the key matrices, where they are stored by themselves, stay dense."""
    layers = {} if family == "gpt2" else {"num_hidden_layers": 3}
    config = AutoConfig.for_model(family, **FAMILIES[family], **layers, vocab_size=258, pad_token_id=0)
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(0.2 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    dense = assemble(module, byte_tokenizer(), None, source="test", name=family)
    made = twin(dense.module)
    factors = [part for part in random_factors(dense.architecture) if part.group.matrix != "k"]
    replace_matrices(made, dense.architecture, factors, LAYOUTS[layout]())
    folder = bs_exp.save_model(made, dense.tokenizer, tmp_path / "model")
    _compare(folder, _serve(folder, dtype="float32"), torch.float32, 2e-4)


def test_a_model_through_the_transformers_backend(compressed: Callable[[str], Path]) -> None:
    folder = compressed("basis_sharing")
    served = _serve(folder, dtype="float32", model_impl="transformers")
    _compare(folder, served, torch.float32, 1e-4)
    assert served.stored == _stored_in(folder)


def _with_config(folder: Path, to: Path, **changes: Any) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "config.json").read_text())
    config["quantization_config"].update(changes)
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_a_group_that_spans_stages_of_a_pipeline_is_refused(compressed: Callable[[str], Path]) -> None:
    code = (
        "from vllm.config import set_current_vllm_config\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "if __name__ == '__main__':\n"
        f"    args = EngineArgs(model={str(compressed('basis_sharing'))!r}, pipeline_parallel_size=2)\n"
        "    config = args.create_engine_config()\n"
        "    with set_current_vllm_config(config):\n"
        "        config.quant_config.check_pipeline()\n"
    )
    assert _run(["-c", code]).returncode == 0  # blocks 0 to 3, and 4 to 7
    ended = _run(["-c", code], VLLM_PP_LAYER_PARTITION="3,5")
    assert ended.returncode != 0
    assert "share a basis, so they must be in one process" in ended.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"groups": [{"members": ["model.layers.0.self_attn.x_proj"], "rank": 4}]}, "x_proj is factorised"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(
    changes: dict[str, Any], words: str, compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = _with_config(compressed("svd_llm"), tmp_path / "other", **changes)
    ended = _run(
        ["-m", "tests.support.serve_with_vllm", str(folder), json.dumps({"settings": {"enforce_eager": True}})]
    )
    assert ended.returncode != 0
    assert words in ended.stderr


def test_an_old_vllm_names_the_supported_range(compressed: Callable[[str], Path]) -> None:
    code = (
        "import vllm; vllm.__version__ = '0.9.1'\n"
        "from vllm.config import ModelConfig\n"
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        f"ModelConfig({str(compressed('svd_llm'))!r})"
    )
    ended = _run(["-c", code])
    assert ended.returncode != 0
    assert "vllm>=0.32; this is vllm 0.9.1" in ended.stderr
