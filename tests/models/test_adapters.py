"""A saved compressed model with adapters, in the hands of peft, Transformers and lm-eval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bs_exp.models.modeling_basis_sharing import FactorisedLinear
from bs_exp.models.saving import ADAPTER_FOLDER, save_model
from bs_exp.models.tiny import TinyRandom
from bs_exp.protocols import Layout
from bs_exp.testing.models import LAYOUTS, updated, values
from tests.update.test_lora import LORA

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
IN_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
IDS = torch.arange(20)[None]


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Path, Tensor]]:
    """Trains and saves a model with adapters; returns its folder and its logits."""

    def save(layout: Layout, family: str = "llama", **settings: Any) -> tuple[Path, Tensor]:
        dense = TinyRandom(family=family).load()
        made = updated(dense, replace(LORA, merge=False, holdout=0.0, **settings), layout=layout)
        return save_model(made.module, dense.tokenizer, tmp_path / "model"), logits_of(made.module)

    return save


def loaded(folder: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(folder)
    return PeftModel.from_pretrained(base, folder / ADAPTER_FOLDER)


def bases_are_shared(model: PreTrainedModel) -> bool:
    owners, *_ = (g["members"] for g in model.config.quantization_config.groups if len(g["members"]) > 1)
    first, second = (model.get_submodule(name) for name in owners[:2])
    return bool(first.basis is second.basis)


@IN_LAYOUTS
@pytest.mark.parametrize("settings", [{}, {"factors": "basis"}, {"factors": "coefficients"}, {"rank": 12}], ids=repr)
def test_peft_merges_the_adapter_of_a_shared_basis_once(saved: Any, layout: Layout, settings: dict[str, Any]) -> None:
    folder, logits = saved(layout, **settings)
    adapted = loaded(folder)
    assert torch.equal(logits_of(adapted), logits)
    bare = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.allclose(logits_of(bare), logits, atol=1e-2)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), logits, rtol=1e-4, atol=1e-4)
    assert values(merged).keys() == values(bare).keys() and bases_are_shared(merged)


@IN_LAYOUTS
def test_adapters_are_merged_and_taken_out_again(saved: Any, layout: Layout, tmp_path: Path) -> None:
    folder, logits = saved(layout)
    plain = logits_of(AutoModelForCausalLM.from_pretrained(folder))
    adapted = loaded(folder)
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted), plain)
    adapted.merge_adapter()
    torch.testing.assert_close(logits_of(adapted), logits, rtol=1e-4, atol=1e-4)
    adapted.unmerge_adapter()
    torch.testing.assert_close(logits_of(adapted), logits, rtol=1e-4, atol=1e-4)
    assert torch.allclose(logits_of(adapted.unload()), plain, rtol=1e-4, atol=1e-4)
    # A merged model is saved and loaded as any other.
    merged = loaded(folder).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(again), logits_of(merged)) and bases_are_shared(again)


def test_the_adapter_of_a_shared_basis_is_stored_once(saved: Any) -> None:
    folder, _ = saved(LAYOUTS[0], factors="basis")
    model = AutoModelForCausalLM.from_pretrained(folder)
    groups = model.config.quantization_config.groups
    stored = load_file(folder / ADAPTER_FOLDER / "adapter_model.safetensors")
    assert len(stored) == 2 * len(groups) < 2 * sum(len(group["members"]) for group in groups)


def test_a_users_own_adapter_on_factors_is_trained_saved_and_merged(saved: Any, tmp_path: Path) -> None:
    """Every factor is a linear layer to peft, a shared basis a single one."""
    folder, _ = saved(LAYOUTS[0])
    torch.manual_seed(0)
    settings = LoraConfig(target_modules=["basis_map", "weight_map"], r=2, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings).eval()
    model(IDS, labels=IDS).loss.backward()
    factors = {id(f) for m in model.modules() if isinstance(m, FactorisedLinear) for f in (m.basis, m.weight)}
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert len(trained) == 2 * len(factors) and all(".lora_" in name for name in trained)
    model.save_pretrained(tmp_path / "own")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "own")
    assert torch.equal(logits_of(again), logits_of(model))
    torch.testing.assert_close(logits_of(again.merge_and_unload()), logits_of(model), rtol=1e-4, atol=1e-4)


@IN_LAYOUTS
@pytest.mark.parametrize("family", ["gemma", "llama"])  # gemma ties its embeddings too
def test_ties_are_made_anew_with_adapters(saved: Any, layout: Layout, family: str) -> None:
    folder, logits = saved(layout, family)
    adapted = loaded(folder)
    for model in (adapted, adapted.base_model.model):
        model.tie_weights()
    vocabulary = adapted.config.vocab_size
    adapted.resize_token_embeddings(vocabulary + 3)
    assert torch.equal(logits_of(adapted)[..., :vocabulary], logits)
    assert bases_are_shared(adapted.base_model.model)
    merged = adapted.merge_and_unload()
    merged.tie_weights()
    torch.testing.assert_close(logits_of(merged)[..., :vocabulary], logits, rtol=1e-4, atol=1e-4)


def test_ties_are_made_anew_where_peft_wraps_the_layers_themselves(saved: Any, tmp_path: Path) -> None:
    """As adapters of Parameters do: a layer is then called `LAYER.base_layer`, or `LAYER.base_layer.base_layer`."""
    folder, _ = saved(LAYOUTS[0], "gemma")
    base = AutoModelForCausalLM.from_pretrained(folder)
    groups = base.config.quantization_config.groups
    alone = [f"{group['members'][0]}.basis" for group in groups if len(group["members"]) == 1]
    targets = [*(f"{member}.weight" for group in groups for member in group["members"]), *alone]
    assert alone
    wrapped = get_peft_model(base, LoraConfig(target_modules=[], target_parameters=targets, r=1))
    expected = logits_of(wrapped)
    wrapped.tie_weights()
    assert torch.equal(logits_of(wrapped), expected)
    assert torch.equal(logits_of(wrapped.unload()), expected)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")  # lm-eval passes what it read
def test_lm_eval_reads_model_and_adapters(saved: Any) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder, logits = saved(LAYOUTS[0], "gemma")
    peft = str(folder / ADAPTER_FOLDER)
    harness = HFLM(pretrained=str(folder), peft=peft, device="cpu", dtype="float32", batch_size=1)
    assert torch.equal(logits_of(harness.model), logits)
    request = Instance("loglikelihood", {}, ("the model", " reads"), 0)
    ((score, _),) = harness.loglikelihood([request], disable_tqdm=True)
    assert score < 0


@IN_LAYOUTS
def test_dtypes_change_in_place_and_back(saved: Any, layout: Layout) -> None:
    """Oracle: every floating-point tensor converted on its own; bits and numbers of features stay."""
    folder, _ = saved(layout)
    model = AutoModelForCausalLM.from_pretrained(folder)
    kept = {name: t.clone() for name, t in model.named_buffers() if not t.is_floating_point()}
    old = {name: t.detach().clone() for name, t in model.named_parameters()}
    chain: list[tuple[Callable[[], Any], torch.dtype]] = [
        (model.half, torch.float16),
        (model.float, torch.float32),
        (model.bfloat16, torch.bfloat16),
        (model.half, torch.float16),
        (model.double, torch.float64),
        (model.float, torch.float32),
    ]
    for change, dtype in chain:
        assert change() is model and model.dtype is dtype
        old = {name: t.to(dtype) for name, t in old.items()}
        assert all(torch.equal(t, old[name]) for name, t in model.named_parameters())
        assert all(torch.equal(t, kept[name]) for name, t in model.named_buffers() if not t.is_floating_point())
        assert bases_are_shared(model) and logits_of(model).isfinite().all()


def test_an_adapter_on_the_parameter_of_a_shared_basis_is_refused(saved: Any) -> None:
    """peft would keep one in every layer, and merge all of them into the one basis."""
    folder, _ = saved(LAYOUTS[0])
    settings = LoraConfig(target_modules=[], target_parameters=["q_proj.basis"], r=2, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings)
    with pytest.raises(ValueError, match=r"shares its basis with 1 others.*target_modules=\[\"basis_map\"\]"):
        model(IDS)
