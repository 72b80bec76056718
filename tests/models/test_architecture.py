"""Discovery: the right matrices, with the right sides and sites, in every family; and clear errors for the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bs_exp.errors import ConfigError, ModelError
from bs_exp.models.architecture import find_architecture, module_of, read_roles, trunks, weight_of
from bs_exp.models.tiny import FAMILIES, tiny_random
from bs_exp.types import MATRIX_TYPES, LoadedModel

LLAMA = {
    "q": ("attn_in", "self_attn.q_proj", 32, 32),
    "k": ("attn_in", "self_attn.k_proj", 32, 16),
    "v": ("attn_in", "self_attn.v_proj", 32, 16),
    "o": ("attn_out", "self_attn.o_proj", 32, 32),
    "gate": ("mlp_in", "mlp.gate_proj", 32, 48),
    "up": ("mlp_in", "mlp.up_proj", 32, 48),
    "down": ("mlp_hidden", "mlp.down_proj", 48, 32),
}
# Family -> path of the blocks, and matrix type -> (input site, name in the block, d_in, d_out).
EXPECTED = {
    "llama": ("model.layers", LLAMA),
    "mistral": ("model.layers", LLAMA),
    "qwen2": ("model.layers", LLAMA),
    "qwen3": ("model.layers", LLAMA),
    "gemma": ("model.layers", LLAMA),
    "opt": (
        "model.decoder.layers",
        {
            "q": ("attn_in", "self_attn.q_proj", 32, 32),
            "k": ("attn_in", "self_attn.k_proj", 32, 32),
            "v": ("attn_in", "self_attn.v_proj", 32, 32),
            "o": ("attn_out", "self_attn.out_proj", 32, 32),
            "up": ("mlp_in", "fc1", 32, 48),
            "down": ("mlp_hidden", "fc2", 48, 32),
        },
    ),
    "gpt2": (
        "transformer.h",
        {
            "qkv": ("attn_in", "attn.c_attn", 32, 96),
            "o": ("attn_out", "attn.c_proj", 32, 32),
            "up": ("mlp_in", "mlp.c_fc", 32, 48),
            "down": ("mlp_hidden", "mlp.c_proj", 48, 32),
        },
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        {
            "qkv": ("attn_in", "attention.query_key_value", 32, 96),
            "o": ("attn_out", "attention.dense", 32, 32),
            "up": ("mlp_in", "mlp.dense_h_to_4h", 32, 48),
            "down": ("mlp_hidden", "mlp.dense_4h_to_h", 48, 32),
        },
    ),
    "phi3": (
        "model.layers",
        {
            "qkv": ("attn_in", "self_attn.qkv_proj", 32, 64),
            "o": ("attn_out", "self_attn.o_proj", 32, 32),
            "gate_up": ("mlp_in", "mlp.gate_up_proj", 32, 96),
            "down": ("mlp_hidden", "mlp.down_proj", 48, 32),
        },
    ),
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> LoadedModel:
    return tiny_random(request.param)


def _from_config(model_type: str, **settings: object) -> PreTrainedModel:
    config = AutoConfig.for_model(
        model_type, vocab_size=64, bos_token_id=0, eos_token_id=0, pad_token_id=0, hidden_size=32, **settings
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", EXPECTED)
def test_matrices_are_found_with_type_site_and_sides(family: str) -> None:
    architecture = tiny_random(family).architecture
    stack, expected = EXPECTED[family]
    assert architecture.family == family
    assert architecture.num_layers == 3
    assert architecture.untouched == ()
    found = [(m.layer, m.matrix, m.site, m.module, m.d_in, m.d_out) for m in architecture.matrices]
    assert found == [
        (layer, matrix, site, f"{stack}.{layer}.{name}", d_in, d_out)
        for layer in range(3)
        for matrix, (site, name, d_in, d_out) in expected.items()
    ]


def test_every_linear_layer_of_the_model_is_a_matrix_except_the_head(model: LoadedModel) -> None:
    linear = {name for name, part in model.module.named_modules() if isinstance(part, nn.Linear | Conv1D)}
    heads = {name for name in linear if model.module.get_submodule(name) is model.module.get_output_embeddings()}
    assert len(heads) == 1
    assert {m.module for m in model.architecture.matrices} == linear - heads


def test_weight_and_input_site_are_what_the_forward_pass_uses(model: LoadedModel) -> None:
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    handles = []
    for matrix in model.architecture.matrices:

        def keep(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor, name: str = matrix.module) -> None:
            inputs[name], outputs[name] = args[0].clone(), output.clone()  # falcon adds to its output in place

        handles.append(module_of(model.module, matrix).register_forward_hook(keep))
    with torch.no_grad():
        model.module(input_ids=torch.arange(20)[None])
    for handle in handles:
        handle.remove()
    fed: dict[str, torch.Tensor] = {}
    for matrix in model.architecture.matrices:
        x = inputs[matrix.module]
        assert torch.equal(fed.setdefault(matrix.input_site, x), x), f"{matrix.module} has a site of its own"
        weight = weight_of(model.module, matrix)
        assert weight.shape == (matrix.d_in, matrix.d_out)
        bias = module_of(model.module, matrix).bias
        y = x @ weight.detach() + (0 if bias is None else bias.detach())
        torch.testing.assert_close(y, outputs[matrix.module], rtol=1e-4, atol=1e-5)
    sites = {tuple(m.site for m in model.architecture.matrices if m.layer == layer) for layer in range(3)}
    assert len(sites) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weight_is_a_view(family: str) -> None:
    model = tiny_random(family)
    matrix = model.architecture.matrices[-1]
    with torch.no_grad():
        weight_of(model.module, matrix)[2, 3] = 7.0
    assert (module_of(model.module, matrix).weight == 7.0).sum() == 1


def test_the_trunk_computes_hidden_states_not_logits(model: LoadedModel) -> None:
    (trunk,) = trunks(model.module)
    assert all(part is not model.module.get_output_embeddings() for part in trunk.modules())
    with torch.no_grad():
        hidden = trunk(input_ids=torch.arange(5)[None]).last_hidden_state
    assert hidden.shape == (1, 5, 32)


def test_fused_experts_and_routers_stay_dense_and_are_listed() -> None:
    architecture = tiny_random("mixtral", layers=1).architecture
    assert architecture.matrix_types == ("q", "k", "v", "o")
    assert architecture.untouched == (
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    )


def test_latent_attention_and_shared_experts_have_sites_of_their_own() -> None:
    model = _from_config(
        "deepseek_v3", num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2, intermediate_size=48,
        moe_intermediate_size=16, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1,
    )  # fmt: skip
    layers = [{m.matrix: m.site for m in find_architecture(model).matrices if m.layer == layer} for layer in (0, 1)]
    attention = {"o": "attn_out", "q_a": "attn_in", "q_b": "q_latent", "kv_a": "attn_in", "kv_b": "kv_latent"}
    assert layers[0] == attention | {"gate": "mlp_in", "up": "mlp_in", "down": "mlp_hidden"}
    assert layers[1] == attention | {
        "shared_gate": "shared_mlp_in", "shared_up": "shared_mlp_in", "shared_down": "shared_mlp_hidden",
    }  # fmt: skip


def test_an_unknown_family_lists_its_linear_layers_and_says_how_to_map_them() -> None:
    with pytest.raises(ModelError) as caught:
        find_architecture(_from_config("mamba", num_hidden_layers=2))
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "MambaForCausalLM (model type 'mamba'): no role is known for the linear layers "
        "mixer.dt_proj, mixer.in_proj, mixer.x_proj."
    )
    assert [line.split() for line in lines[2:6]] == [
        ["backbone.layers.*.mixer.in_proj", "Linear", "32", "->", "128", "?"],
        ["backbone.layers.*.mixer.x_proj", "Linear", "64", "->", "34", "?"],
        ["backbone.layers.*.mixer.dt_proj", "Linear", "2", "->", "64", "?"],
        ["backbone.layers.*.mixer.out_proj", "Linear", "64", "->", "32", "o"],
    ]
    unclear = ["mixer.dt_proj: TYPE", "mixer.in_proj: TYPE", "mixer.x_proj: TYPE"]
    assert lines[7:12] == ["  model:", "    roles:", *(f"      {role}" for role in unclear)]
    assert lines[13] == f"  'model.roles={{{', '.join(unclear)}}}'"
    assert lines[14].startswith("TYPE is what the layer does: q k v qkv o gate up")


def test_only_what_is_unclear_is_asked_for_and_what_fits_is_kept() -> None:
    with pytest.raises(ModelError) as caught:
        find_architecture(_from_config("mamba", num_hidden_layers=2), {"in_proj": "up", "xproj": "down"})
    expected = "'model.roles={in_proj: up, mixer.dt_proj: TYPE, mixer.x_proj: TYPE}'"
    assert expected in str(caught.value) and "xproj: down" not in str(caught.value)


def test_numbers_that_tell_layers_of_a_block_apart_are_kept() -> None:
    """A Sequential names its layers by number; what lies in numbered parts, such as experts, has one name for all."""
    model = tiny_random("llama", layers=2).module
    for block in model.model.layers:
        del block.mlp
        block.ffn = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        block.experts = nn.ModuleList(nn.ModuleDict({"wide": nn.Linear(32, 8)}) for _ in range(3))
    with pytest.raises(ModelError) as caught:
        find_architecture(model)
    message = str(caught.value)
    assert "no role is known for the linear layers experts.*.wide, ffn.0, ffn.2." in message
    listed = [line.split()[0] for line in message.splitlines() if line.endswith("?")]
    assert [name.removeprefix("model.layers.*.") for name in listed] == ["ffn.0", "ffn.2", "experts.*.wide"]
    found = find_architecture(model, {"ffn.0": "up", "ffn.2": "down", "experts.*.wide": "dense"})
    assert [(m.d_in, m.d_out) for m in found.of_type("down")] == [(64, 32)] * 2


def test_roles_of_the_user_map_an_unknown_family() -> None:
    roles = {"in_proj": "up", "mixer.out_proj": "down", "x_proj": "dense", "dt_proj": "dense"}
    architecture = find_architecture(_from_config("mamba", num_hidden_layers=2), roles)
    assert architecture.matrix_types == ("up", "down")
    assert [(m.d_in, m.d_out) for m in architecture.of_type("up")] == [(32, 128)] * 2
    assert "backbone.layers.1.mixer.x_proj.weight" in architecture.untouched


def test_roles_of_the_user_come_before_the_table_even_if_shorter() -> None:
    model = tiny_random("gpt_neox").module
    architecture = find_architecture(model, {"dense": "dense"})
    assert architecture.matrix_types == ("qkv", "up", "down")
    assert architecture.untouched == tuple(f"gpt_neox.layers.{layer}.attention.dense.weight" for layer in range(3))


def test_the_longest_suffix_wins_and_a_star_stands_for_one_part() -> None:
    table = read_roles({"w": "q", "experts.*.w": "dense", "experts.0.w": "up"})
    assert table.role_of("attn.w") == "q"
    assert table.role_of("mlp.experts.0.w") == "up"
    assert table.role_of("mlp.experts.7.w") == "dense"
    assert table.role_of("attn.ww") is None
    assert table.role_of("mlp.shared_expert.up_proj") == "shared_up"
    assert table.role_of("mlp.up_proj") == "up"


def test_two_matrices_of_one_type_in_a_layer_are_refused() -> None:
    with pytest.raises(ModelError, match=r"same role: mlp\.gate_proj, mlp\.up_proj\.\n") as caught:
        find_architecture(tiny_random("llama").module, {"gate_proj": "up", "o_proj": "dense"})
    assert "'model.roles={o_proj: dense, mlp.gate_proj: TYPE, mlp.up_proj: TYPE}'" in str(caught.value)


def test_a_role_that_fits_no_layer_is_refused() -> None:
    message = r"model\.roles names q_prj, which no linear layer ends with: leave it out, or name a layer of these\.\n"
    with pytest.raises(ModelError, match=message) as caught:
        find_architecture(tiny_random("llama").module, {"q_prj": "q"})
    assert "self_attn.q_proj  Linear" in str(caught.value) and "model.roles={" not in str(caught.value)


def test_a_model_with_everything_dense_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing is left to compress"):
        find_architecture(tiny_random("gpt2").module, dict.fromkeys(["c_attn", "c_proj", "c_fc"], "dense"))


@pytest.mark.parametrize("roles", [{"q_proj": "quer"}, {"q_proj": None}, ["q_proj"]])
def test_roles_that_are_no_mapping_to_matrix_types_are_refused(roles: object) -> None:
    with pytest.raises(ConfigError, match=r"model\.roles"):
        read_roles(roles)  # type: ignore[arg-type]


def test_layers_that_already_share_a_weight_are_refused() -> None:
    model = tiny_random("llama").module
    layers = model.get_submodule("model.layers")
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight, model\.layers\.2\.mlp\.up_proj\.weight"):
        find_architecture(model)
    assert "up" not in find_architecture(model, {"up_proj": "dense"}).matrix_types


def test_a_repeated_block_is_refused() -> None:
    model = tiny_random("llama").module
    layers = model.get_submodule("model.layers")
    layers[1] = layers[0]
    with pytest.raises(ModelError, match="used in several places"):
        find_architecture(model)


def test_quantised_layers_are_refused() -> None:
    model = tiny_random("llama").module
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    layer.weight = nn.Parameter(torch.zeros(48, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj .*uint8.* is quantised"):
        find_architecture(model)


def test_matrices_of_several_dtypes_are_refused_but_for_those_that_transformers_keeps_apart() -> None:
    model = tiny_random("llama").module
    model.model.layers[0].mlp.double()
    with pytest.raises(
        ModelError, match=r"float32 in \d+, such as .*q_proj; float64 in 3, such as .*\.to\(torch.float32\)"
    ):
        find_architecture(model)
    mixed = tiny_random("t5").module.bfloat16()
    for block in [*mixed.encoder.block, *mixed.decoder.block]:
        block.layer[-1].DenseReluDense.wo.float()
    assert find_architecture(mixed).matrices


def test_a_replaced_layer_is_no_dense_layer() -> None:
    model = tiny_random("llama")
    matrix = model.architecture.by_position["q", 1]
    model.module.get_submodule("model.layers.1.self_attn").q_proj = nn.Identity()
    with pytest.raises(ModelError, match=r"model\.layers\.1\.self_attn\.q_proj is a Identity"):
        weight_of(model.module, matrix)


def test_the_table_knows_exactly_the_matrix_types() -> None:
    assert tuple(read_roles().sites) == MATRIX_TYPES
