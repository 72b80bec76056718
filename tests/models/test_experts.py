"""Routed experts taken apart: the same outputs, compressed one by one or in groups, saved and loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bs_exp.cache import Cache
from bs_exp.errors import ConfigError, ModelError
from bs_exp.evaluation.size import measure_size
from bs_exp.models.architecture import find_architecture, weight_of
from bs_exp.models.experts import unfused
from bs_exp.models.fingerprint import fingerprint
from bs_exp.models.loading import assemble
from bs_exp.models.modeling_basis_sharing import BasisSharingConfig, UnfusedExperts, can_unfuse
from bs_exp.models.saving import save_model
from bs_exp.models.surgery import to_dense
from bs_exp.models.tiny import MIXTURES, TinyRandom, byte_tokenizer, tiny_random
from bs_exp.pipeline import compress, prepare, seen_by
from bs_exp.progress import Progress
from bs_exp.sharing.adjacent import AdjacentSharing
from bs_exp.sharing.none import NoSharing
from bs_exp.types import CompressedModel, LoadedModel
from bs_exp.workspace import Workspace
from tests.support.recipes import RECIPE

# Families whose experts are stored in the same way, though nothing here names them.
OTHERS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"n_routed_experts": 4, "num_experts": 4, "kv_lora_rank": 8, "first_k_dense_replace": 1},
    "deepseek_v3": {"n_routed_experts": 4, "kv_lora_rank": 8, "first_k_dense_replace": 1},
    "olmoe": {"num_experts": 4},
    "phimoe": {"num_local_experts": 4},  # Transformers renames its routers as it loads them
}
SIZES = {
    **{"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2},
    **{"intermediate_size": 24, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "vocab_size": 258},
    **{"q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1},
    **{"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
}


def model_of(family: str) -> LoadedModel:
    if family in MIXTURES:
        return tiny_random(family, layers=2)
    config = AutoConfig.for_model(family, **SIZES, **OTHERS[family])
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return assemble(module, byte_tokenizer(), None, source="test", name=family)


def logits(module: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(torch.arange(48).reshape(2, 24) * 5 % 256).logits
    return found


def compressed(dense: LoadedModel, **changes: Any) -> tuple[CompressedModel, LoadedModel]:
    """The compressed model, and the dense one as the recipe saw it."""
    recipe, progress = replace(RECIPE, **changes), Progress(quiet=True)
    prepared = prepare(dense, recipe, progress)
    return compress(dense, recipe, Workspace(Cache(None), progress), prepared), prepared.dense


@pytest.mark.parametrize("family", [*MIXTURES, *OTHERS])
def test_experts_apart_compute_what_the_eager_code_does(family: str) -> None:
    dense = model_of(family)
    dense.module.set_experts_implementation("eager")
    dense.module.double()
    apart = unfused(dense)
    # Gate and up are two products in place of one.
    torch.testing.assert_close(logits(apart.module), logits(dense.module), rtol=0, atol=1e-12)
    assert apart.architecture.num_layers == dense.architecture.num_layers
    assert not any("experts" in name for name in apart.architecture.untouched)
    assert unfused(apart) is apart
    assert apart.fingerprint != dense.fingerprint


def test_weights_are_views_and_the_given_model_stays_as_it_is() -> None:
    dense = tiny_random("mixtral", layers=1)
    before, state = fingerprint(dense.module), dict(dense.module.named_parameters())
    apart = unfused(dense)
    fused = dense.module.get_submodule("model.layers.0.mlp.experts")
    for matrix in apart.architecture.matrices:
        if matrix.expert is not None:
            name, whole = matrix.matrix, fused.down_proj if matrix.matrix == "expert_down" else fused.gate_up_proj
            assert isinstance(whole, Tensor)
            rows = {"expert_gate": slice(0, 48), "expert_up": slice(48, 96), "expert_down": slice(None)}[name]
            found = weight_of(apart.module, matrix)
            assert torch.equal(found, whole[matrix.expert, rows].T)
            assert found.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    compress(dense, RECIPE, Workspace(Cache(None), Progress(quiet=True)))
    assert fingerprint(dense.module) == before
    assert all(dense.module.get_parameter(name) is parameter for name, parameter in state.items())


def test_every_expert_has_matrices_and_sites_of_its_own() -> None:
    apart = unfused(tiny_random("qwen3_moe", layers=2)).architecture
    experts = [m for m in apart.matrices if m.expert is not None]
    assert len(experts) == 2 * 4 * 3
    assert {(m.matrix, m.input_site) for m in experts if (m.layer, m.expert) == (1, 3)} == {
        ("expert_gate", "1.expert_in.3"),
        ("expert_up", "1.expert_in.3"),
        ("expert_down", "1.expert_hidden.3"),
    }
    assert [str(m.place) for m in apart.of_type("expert_up")] == [f"{i}.{e}" for i in range(2) for e in range(4)]
    assert len(apart.by_position) == len(apart.matrices)


def test_experts_stay_dense_where_their_role_says_so() -> None:
    dense = TinyRandom(family="mixtral", layers=1, roles={"experts": "dense"}).load()
    assert dense.architecture.fused == ()
    assert unfused(dense) is dense
    found, _ = compressed(dense, sharing=NoSharing())
    assert type(found.module.get_submodule("model.layers.0.mlp.experts")).__name__ == "MixtralExperts"
    with pytest.raises(ModelError, match=r"model\.roles names expert, which no linear layer ends with"):
        find_architecture(dense.module, {"expert": "dense"})


def test_only_experts_that_are_stored_as_expected_can_be_taken_apart() -> None:
    fused = tiny_random("mixtral", layers=1).module.get_submodule("model.layers.0.mlp.experts")
    assert can_unfuse(fused)
    for name, value in {"has_bias": True, "is_transposed": True, "is_concatenated": False, "has_gate": False}.items():
        before = getattr(fused, name)
        setattr(fused, name, value)
        assert not can_unfuse(fused)
        with pytest.raises(ValueError, match="MixtralExperts holds no experts that can be taken apart"):
            UnfusedExperts.unfusing(fused)
        setattr(fused, name, before)
    assert not can_unfuse(nn.Linear(2, 2))


def test_experts_that_compute_something_else_are_refused() -> None:
    dense = tiny_random("mixtral", layers=1)
    fused = dense.module.get_submodule("model.layers.0.mlp.experts")

    class Doubled(type(fused)):  # type: ignore[misc]
        def forward(self, *given: Tensor) -> Tensor:
            found: Tensor = 2.0 * super().forward(*given)
            return found

    fused.__class__ = Doubled
    with pytest.raises(ModelError, match=r"Doubled\) computes something else .* model.roles=\{experts: dense\}"):
        unfused(dense)


@pytest.mark.parametrize("family", [*MIXTURES, *OTHERS])
@pytest.mark.parametrize("shared", [False, True])
def test_saved_loaded_and_made_dense_they_give_the_same(family: str, shared: bool, tmp_path: Path) -> None:
    dense, block = model_of(family), "model.layers.1.mlp.experts"
    types = ("q", "expert_gate", "expert_up", "expert_down")
    sharing: Any = AdjacentSharing(matrices=types, group_size=2) if shared else NoSharing()
    found, seen = compressed(dense, sharing=sharing)
    wanted = logits(found.module)
    assert not torch.allclose(wanted, logits(dense.module), atol=0.1)
    folder = save_model(found.module, dense.tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded), wanted)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), wanted)
    plain = to_dense(loaded)
    assert type(plain.get_submodule(block)) is type(dense.module.get_submodule(block))
    plain.save_pretrained(tmp_path / "dense")
    for module in (plain, AutoModelForCausalLM.from_pretrained(tmp_path / "dense")):
        torch.testing.assert_close(logits(module), wanted, rtol=0, atol=5e-5)
    size = measure_size(seen, found, found.plan)
    assert size["targeted_parameters"] == found.plan.parameters
    assert size["retain_ratio"] == pytest.approx(found.plan.retain_ratio) and size["retain_ratio"] <= 0.6
    assert size["dense_parameters"] == dense.module.num_parameters()
    routed = sum(p.group.parameters for p in found.plan.groups if p.group.is_routed)
    fused = [dense.module.get_submodule(path) for path in dense.architecture.fused]
    assert fused and routed == sum(p.numel() for experts in fused for p in experts.parameters())


def test_what_stays_dense_has_weights_of_its_own(tmp_path: Path) -> None:
    dense = tiny_random("mixtral", layers=1)
    found, _ = compressed(dense, retain_ratio=1.0)
    theirs = {p.untyped_storage().data_ptr() for p in dense.module.get_submodule("model.layers.0.mlp").parameters()}
    experts = found.module.get_submodule("model.layers.0.mlp.experts")
    assert not any(p.untyped_storage().data_ptr() in theirs for p in experts.parameters())
    folder = save_model(found.module, dense.tokenizer, tmp_path / "model")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(found.module))


def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quantization_config\.experts must be a list of module names, got 3"):
        BasisSharingConfig(experts=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"quantization_config\.experts names a module twice"):
        BasisSharingConfig(experts=["a", "a"])
    dense = tiny_random("mixtral", layers=1)
    found, _ = compressed(dense)
    folder = save_model(found.module, dense.tokenizer, tmp_path / "model")
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"model.layers.0.mlp.experts"', '"model.layers.0.mlp.gate"', 1))
    with pytest.raises(ValueError, match=r"names model.layers.0.mlp.gate, a MixtralTopKRouter, which holds no experts"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("family", MIXTURES)
def test_predicted_losses_are_measured_on_the_tokens_sent_to_each_expert(family: str) -> None:
    """Oracle: the inputs that an expert's matrix read, times the difference of the stored products."""
    dense = model_of(family)
    dense.module.set_experts_implementation("eager")
    dense.module.double()
    apart = seen_by(RECIPE.sharing, dense)
    recipe = replace(
        RECIPE, sharing=AdjacentSharing(matrices=("expert_gate", "expert_down"), group_size=3), retain_ratio=0.5
    )
    found = compress(dense, recipe, Workspace(Cache(None), Progress(quiet=True)))
    seen: dict[str, list[Tensor]] = {}
    routed = [m for m in apart.architecture.matrices if m.expert is not None]
    handles = [
        apart.module.get_submodule(m.module).register_forward_pre_hook(
            lambda module, given, name=m.module: seen.setdefault(name, []).append(given[0].detach())
        )
        for m in routed
    ]
    with torch.no_grad():
        apart.module(recipe.calibration.windows(dense.tokenizer).ids)
    for handle in handles:
        handle.remove()
    plain = unfused(replace(dense, module=to_dense(found.module), provenance=dense.provenance))
    checked = 0
    for planned in found.plan.groups:
        group = planned.group
        if not group.is_routed:
            continue
        assert len(group.blocks) == 1 and group.size in (1, 3)
        members = [apart.architecture.by_position[group.matrix, place] for place in group.layers]
        inputs = torch.cat([x for m in members for x in seen[m.module]])
        lost = [(weight_of(apart.module, m) - weight_of(plain.module, m)).detach() for m in members]
        if all(len(torch.cat(seen[m.module])) >= max(m.d_in, m.d_out) for m in members):
            measured = float((inputs @ torch.cat(lost, dim=1)).norm())
            assert planned.predicted_loss == pytest.approx(measured, rel=1e-6)
            checked += 1
    assert checked > 6


def test_matrix_types_of_experts_must_be_there() -> None:
    sharing = AdjacentSharing(matrices=("expert_gate",), group_size=2)
    with pytest.raises(ConfigError, match="names no matrix type of this model"):
        prepare(tiny_random("llama", layers=2), replace(RECIPE, sharing=sharing), Progress(quiet=True))
