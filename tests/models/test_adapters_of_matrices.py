"""peft's LoRA on the matrices of a compressed model by their usual names: `target_modules=["q_proj"]`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bs_exp import to_dense
from bs_exp.cache import Cache
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.modeling_basis_sharing import CorrectedLinear
from bs_exp.models.saving import save_model
from bs_exp.models.tiny import TinyRandom
from bs_exp.pipeline import compress
from bs_exp.sharing.residual import ResidualSharing
from bs_exp.testing.models import QUIET, recipe, same, values
from bs_exp.update.none import NoUpdate
from bs_exp.workspace import Workspace

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
IDS = torch.arange(20)[None]
TYPES = ("q", "k", "v", "qkv", "up", "gate")
# Layout, sharing, family, names: groups of pairs and single layers, biases (opt, gpt2), Conv1D (gpt2), layers that have
# terms of their own before.
CASES = {
    "plain": (PlainLayout(), None, "llama", ["q_proj", "down_proj"]),
    "pivoted": (PivotedLayout(), None, "llama", ["q_proj", "down_proj"]),
    "biases": (PivotedLayout(), None, "opt", ["q_proj", "fc2"]),
    "conv1d": (PlainLayout(), None, "gpt2", ["c_attn", "c_fc"]),
    "corrected": (
        PivotedLayout(),
        ResidualSharing(matrices=TYPES, group_size=2, residual_rank=1),
        "llama",
        ["q_proj", "down_proj"],
    ),
}


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved compressed model for every case."""
    made = {}
    for name, (layout, sharing, family, _) in CASES.items():
        dense = TinyRandom(family=family).load()
        how = recipe(NoUpdate(), layout=layout)
        how = how if sharing is None else replace(how, sharing=sharing)
        model = compress(dense, how, Workspace(Cache(None), QUIET)).module
        made[name] = save_model(model, dense.tokenizer, tmp_path_factory.mktemp(name) / "model")
    return made


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


def adapted(model: PreTrainedModel, names: list[str], **settings: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=names, r=3, lora_alpha=8, **{"init_lora_weights": False, **settings})
    return get_peft_model(model, config).eval()


def changes(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """The change of every adapted matrix `[out, in]`, in fp64, by the matrix's name in the base model."""
    for name, layer in model.base_model.model.named_modules():
        if "default" in getattr(layer, "lora_A", {}):
            down, up = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
            yield name, layer.scaling["default"] * up @ down


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_adds_its_change_to_the_matrix_and_merging_keeps_it(
    folders: dict[str, Path], case: str, tmp_path: Path
) -> None:
    """Oracle: the dense model with the products of the factors, whose weights get the changes in fp64."""
    names = CASES[case][3]
    model = adapted(load(folders[case]), names)
    dense = to_dense(load(folders[case]))
    with torch.no_grad():
        for name, change in changes(model):
            weight = dense.get_submodule(name).weight
            weight += (change if weight.shape == change.shape else change.T).to(weight.dtype)
    expected, logits = logits_of(dense), logits_of(model)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_of(load(folders[case])), logits, atol=1e-2)

    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(load(folders[case])))
    before = values(model.base_model.model)
    model.merge_adapter()
    torch.testing.assert_close(logits_of(model), logits, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert same(values(model.base_model.model), before), "taken out again, to the bit"

    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), logits, rtol=1e-4, atol=1e-4)
    merged.tie_weights()
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert torch.equal(logits_of(again), logits_of(merged))
    for group in again.config.quantization_config.groups:
        layers = [again.get_submodule(name) for name in group["members"]]
        assert len({id(getattr(layer, "shared", layer).basis) for layer in layers}) == 1
    torch.testing.assert_close(logits_of(to_dense(again)), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["plain", "pivoted", "corrected"])
def test_merging_into_one_layer_leaves_the_others_of_its_group(
    folders: dict[str, Path], case: str, tmp_path: Path
) -> None:
    base = load(folders[case])
    group = next(g for g in base.config.quantization_config.groups if len(g["members"]) > 1)
    first, second = group["members"]
    ours = values(base.get_submodule(second))
    merged = adapted(base, [first]).merge_and_unload()
    assert same(values(merged.get_submodule(second)), ours)
    logits = logits_of(merged)
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    torch.testing.assert_close(logits_of(again), logits, rtol=1e-5, atol=1e-5)
    layers = [again.get_submodule(name) for name in (first, second)]
    # Of one rank in a group: the second layer's term is zero where the first has the adapter.
    assert all(isinstance(layer, CorrectedLinear) for layer in layers)
    assert not layers[1].down[-3:].any() and layers[0].down[-3:].all()
    assert layers[0].shared.basis is layers[1].shared.basis


def test_an_adapter_trains_is_saved_and_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(load(folders["pivoted"]), ["q_proj", "v_proj"], init_lora_weights=True, lora_dropout=0.1)
    bare = values(model.base_model.model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == model.get_nb_trainable_parameters()[0]
    steps = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model.train()(IDS, labels=IDS).loss
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = values(model.base_model.model)
    assert all(torch.equal(after[name], value) for name, value in bare.items() if ".lora_" not in name)
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(folders["pivoted"]), tmp_path / "adapter")
    assert torch.equal(logits_of(again), logits_of(model))
    # As Transformers loads it, too, and beside a second one.
    other = load(folders["pivoted"])
    other.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits_of(other), logits_of(model))
    again.add_adapter("second", LoraConfig(target_modules=["q_proj"], r=2))
    again.set_adapter("default")
    assert torch.equal(logits_of(again), logits_of(model))


def test_a_model_that_was_just_compressed_takes_adapters_too() -> None:
    dense = TinyRandom(family="llama").load()
    made = compress(dense, recipe(NoUpdate()), Workspace(Cache(None), QUIET)).module
    logits = logits_of(made)
    model = adapted(made, ["q_proj"])
    assert len(list(changes(model))) == len(dense.architecture.of_type("q"))
    assert not torch.allclose(logits_of(model), logits, atol=1e-2)


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}],
)
def test_what_needs_the_dense_weight_is_refused_by_name(folders: dict[str, Path], settings: dict[str, Any]) -> None:
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=rf"q_proj is stored as two factors.*{name}={value!r}"):
        adapted(load(folders["plain"]), ["q_proj"], **settings)


def test_a_term_above_full_rank_is_saved_at_full_rank(folders: dict[str, Path], tmp_path: Path) -> None:
    merged = adapted(load(folders["plain"]), ["k_proj"], rank_pattern={"k_proj": 40}).merge_and_unload()
    logits = logits_of(merged)
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    torch.testing.assert_close(logits_of(again), logits, rtol=1e-4, atol=1e-4)
    layer = again.model.layers[0].self_attn.k_proj
    assert layer.down.shape[0] == min(layer.in_features, layer.out_features)
