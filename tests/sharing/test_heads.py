"""Attention matrices cut by head: the same model in other pieces, through compression, saving and back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from bs_exp.errors import ConfigError
from bs_exp.evaluation.size import measure_size
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.head_blocks import cut_heads
from bs_exp.models.modeling_basis_sharing import SharedLinear, SplitLinear
from bs_exp.models.saving import save_model
from bs_exp.models.surgery import replace_matrices, to_dense, twin
from bs_exp.models.tiny import tiny_random
from bs_exp.protocols import Layout
from bs_exp.sharing.adjacent import AdjacentSharing
from bs_exp.sharing.heads import HeadSharing
from bs_exp.testing.measures import problem
from bs_exp.types import LoadedModel, PlannedGroup, RankPlan, SharedFactors

TYPES = ("q", "k", "v", "o", "up")
# Grouped queries with biases, one head of keys and values per query, and grouped queries without biases.
FAMILIES = ("qwen2", "opt", "llama")


def sharing(heads_per_block: int | str = "kv", **settings: Any) -> HeadSharing:
    return HeadSharing(**{"matrices": TYPES, "group_size": 2, "heads_per_block": heads_per_block, **settings})


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    found: Tensor = model(torch.arange(24).view(2, 12)).logits
    return found


def compressed(dense: LoadedModel, heads_per_block: int | str, layout: Layout) -> tuple[Any, RankPlan, LoadedModel]:
    """Random factors of rank 2 for every group but those of v, which stay dense."""
    strategy = sharing(heads_per_block)
    seen = strategy.view(dense)
    random = torch.Generator().manual_seed(0)
    factors, planned = [], []
    for group in strategy.groups(problem(seen.architecture)):
        if group.matrix.startswith("v"):
            planned.append(PlannedGroup(group, None, group.parameters, 0.0, 0.0))
            continue
        basis = torch.randn(group.d_in, 2, generator=random, dtype=torch.float64)
        rows = {i: 0.2 * torch.randn(2, group.d_out, generator=random, dtype=torch.float64) for i in group.layers}
        factors.append(SharedFactors(group, basis, rows))
        planned.append(PlannedGroup(group, 2, layout.parameters(group, 2), 0.0, 0.0))
    module = twin(seen.module)
    replace_matrices(module, seen.architecture, factors, layout)
    return module, RankPlan(tuple(planned), 0.5, layout.name), seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("heads_per_block", [1, 2, "kv"])
def test_the_cut_model_is_the_same_model(family: str, heads_per_block: int | str) -> None:
    dense = tiny_random(family)
    before = {name: value.clone() for name, value in dense.module.state_dict().items()}
    cut = cut_heads(dense, set(TYPES), heads_per_block)
    torch.testing.assert_close(logits_of(cut.module), logits_of(dense.module), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in dense.module.state_dict().items())
    assert cut.architecture.parameters == dense.architecture.parameters
    assert cut.fingerprint != dense.fingerprint
    # Views: nothing is stored twice.
    storage = {p.untyped_storage().data_ptr() for p in dense.module.parameters()}
    assert {p.untyped_storage().data_ptr() for p in cut.module.parameters()} == storage


def test_blocks_of_keys_hold_the_heads_that_a_block_of_queries_reads() -> None:
    """The tiny Llama has 4 query heads of 8 channels, and 2 heads of keys and values."""

    def counts(heads_per_block: int | str) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for m in cut_heads(tiny_random("llama"), set(TYPES), heads_per_block).architecture.matrices:
            if m.layer == 0 and "." in m.matrix:
                found.setdefault(m.matrix[0], []).append(m.d_in if m.matrix[0] == "o" else m.d_out)
        return found

    assert counts(1) == {"q": [8] * 4, "k": [8] * 2, "v": [8] * 2, "o": [8] * 4}
    assert counts("kv") == counts(2) == {"q": [16] * 2, "k": [8] * 2, "v": [8] * 2, "o": [16] * 2}
    assert counts(4) == counts("all") == {}


@pytest.mark.parametrize("whole", ["all", 4])
def test_all_heads_in_one_block_is_adjacent_sharing(whole: int | str) -> None:
    dense = tiny_random("llama")
    seen = sharing(whole).view(dense)
    assert seen.architecture == dense.architecture
    adjacent = AdjacentSharing(matrices=TYPES, group_size=2)
    assert sharing(whole).groups(problem(seen.architecture)) == adjacent.groups(problem(dense.architecture))


def test_blocks_of_the_same_heads_share_over_adjacent_layers() -> None:
    seen = sharing(1, matrices=("q", "up")).view(tiny_random("llama"))
    groups = sharing(1, matrices=("q", "up")).groups(problem(seen.architecture))
    by_type: dict[str, list[tuple[int, ...]]] = {}
    for group in groups:
        by_type.setdefault(group.matrix, []).append(group.layers)
    for shared in ("q.0", "q.1", "q.2", "q.3", "up"):
        assert by_type[shared] == [(0, 1), (2,)]
    for alone in ("k", "v", "o", "down"):  # not in `matrices`: whole, and one basis each
        assert by_type[alone] == [(0,), (1,), (2,)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [PlainLayout(), PivotedLayout()], ids=repr)
def test_saved_and_loaded_and_made_dense(family: str, layout: Layout, tmp_path: Path) -> None:
    dense = tiny_random(family)
    model, plan, seen = compressed(dense, 1, layout)
    logits = logits_of(model)
    assert not torch.allclose(logits, logits_of(dense.module), atol=0.1)
    save_model(model, dense.tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(loaded), logits)
    # What was saved can be saved again.
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits)
    restored = to_dense(loaded)
    torch.testing.assert_close(logits_of(restored), logits, rtol=1e-4, atol=5e-5)
    assert [type(m) for m in restored.modules()] == [type(m) for m in dense.module.modules()]
    assert restored.state_dict().keys() == dense.module.state_dict().keys()
    if layout.name == "plain":
        assert (
            measure_size(seen, LoadedModel(model, dense.tokenizer, seen.architecture, {}), plan)["targeted_parameters"]
            == plan.parameters
        )


def test_blocks_that_stay_dense_own_their_weights() -> None:
    dense = tiny_random("qwen2")
    model, _, _ = compressed(dense, 1, PlainLayout())
    values = model.get_submodule("model.layers.0.self_attn.v_proj")
    assert all(isinstance(block, nn.Linear) for block in values.blocks)
    original = dense.module.get_submodule("model.layers.0.self_attn.v_proj").weight
    assert torch.equal(torch.cat([block.weight for block in values.blocks]), original)
    assert original.data_ptr() not in {block.weight.data_ptr() for block in values.blocks}
    assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj").blocks[3], SharedLinear)


def test_nothing_replaced_is_the_dense_model(tmp_path: Path) -> None:
    dense = tiny_random("qwen2")
    seen = sharing(1).view(dense)
    module = twin(seen.module)
    replace_matrices(module, seen.architecture, [], PlainLayout())
    save_model(module, dense.tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(to_dense(loaded)), logits_of(dense.module))


def test_some_blocks_of_a_layer_may_stay_dense(tmp_path: Path) -> None:
    dense = tiny_random("llama")
    seen = sharing(1).view(dense)
    group = next(g for g in sharing(1).groups(problem(seen.architecture)) if g.matrix == "q.1")
    basis = torch.ones(group.d_in, 1, dtype=torch.float64)
    rows = {layer: 0.01 * torch.ones(1, group.d_out, dtype=torch.float64) for layer in group.layers}
    module = twin(seen.module)
    replace_matrices(module, seen.architecture, [SharedFactors(group, basis, rows)], PlainLayout())
    save_model(module, dense.tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(loaded), logits_of(module))
    expected = dense.module.get_submodule("model.layers.1.self_attn.q_proj").weight.detach().clone()
    expected[8:16] = 0.01
    torch.testing.assert_close(to_dense(loaded).get_submodule("model.layers.1.self_attn.q_proj").weight, expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_adapters_go_on_blocks(tmp_path: Path) -> None:
    """On blocks in groups and on those that stay dense (of v), merged, saved and loaded; on the whole matrix none."""
    from peft import LoraConfig, get_peft_model

    dense = tiny_random("llama")
    save_model(compressed(dense, 1, PivotedLayout())[0], dense.tokenizer, tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"q_proj is cut into blocks.*target_modules=r\"\.\*_proj\\\.blocks\\\.\\d\+\""
    ):
        get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    settings = LoraConfig(target_modules=r".*[qv]_proj\.blocks\.\d+", r=1, init_lora_weights=False)
    adapted = get_peft_model(base, settings).eval()
    logits = logits_of(adapted)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(again), logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits, atol=1e-2)


def test_a_process_without_the_plugin_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_random("llama")
    save_model(compressed(dense, 1, PlainLayout())[0], dense.tokenizer, tmp_path / "model")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "basis_sharing")
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "basis_sharing")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"  # where the word for others is gone, or not read, shapes do not fit
    config.write_text(re.sub('"transformers_weights": .*', "", config.read_text()))
    with pytest.raises((RuntimeError, ValueError), match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": [8, 8]}, "cannot be cut into"),
        ({"axis": "across"}, "cannot be cut into"),
        ({"sizes": []}, "splits needs `module`"),
        ({"more": 1}, "splits needs `module`"),
        ({"module": "model.layers.9.mlp"}, "no module 'model.layers.9.mlp'"),
    ],
)
def test_a_folder_with_wrong_splits_says_why(tmp_path: Path, change: dict[str, object], message: str) -> None:
    dense = tiny_random("llama")
    folder = save_model(compressed(dense, 1, PlainLayout())[0], dense.tokenizer, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["splits"][0] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_split_layer_is_linear_and_merges_back(axis: str, kind: str) -> None:
    dense = nn.Linear(6, 6) if kind == "linear" else Conv1D(6, 6)
    nn.init.normal_(dense.weight)
    nn.init.normal_(dense.bias)
    split = SplitLinear.cutting(dense, [1, 2, 3], axis)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(split(x), dense(x))
    merged = split.merged()
    assert type(merged) is type(dense) and torch.equal(merged.weight, dense.weight) and merged.bias is dense.bias
    assert f"axis={axis}, sizes=[1, 2, 3], bias=True" in repr(split)
    with pytest.raises(ValueError, match=r"cannot be cut into \[4, 4\]"):
        SplitLinear.cutting(dense, [4, 4], axis)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "bloom", "gpt_neox"])
def test_fused_projections_are_refused(family: str) -> None:
    with pytest.raises(ConfigError, match=rf"cannot cut qkv of this {family} model by head.*sharing=attention"):
        sharing(matrices=("qkv", "q", "up")).view(tiny_random(family))
    assert sharing("all", matrices=("qkv", "up")).view(tiny_random(family))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads_per_block": 3}, r"heads_per_block must be kv, all, or one of 1, 2, 4 \(4 query heads, 2 for each"),
        ({"heads_per_block": 8}, "got 8"),
        ({"matrices": ("gate_up",)}, "names no matrix type of this model"),
    ],
)
def test_what_does_not_fit_the_model(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sharing(**wrong).view(tiny_random("llama"))


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="heads_per_block must be a number, kv or all, got 'few'"):
        sharing("few")
    with pytest.raises(ConfigError, match="heads_per_block must be a whole number of at least 1, got 0"):
        sharing(0)
    with pytest.raises(ConfigError, match=r"sharing\.group_size must be between 1 and 3 .*got 4"):
        sharing(group_size=4).check(tiny_random("llama").architecture)
