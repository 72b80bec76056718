"""Models whose trunk is not where Transformers' usual names point: plain modules, nested stacks, a wrong prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, FunnelModel, PreTrainedModel

from bs_exp.errors import CalibrationError, ModelError
from bs_exp.models.architecture import find_architecture, trunks
from bs_exp.models.auto_classes import AUTO_CLASSES
from bs_exp.models.loading import assemble
from bs_exp.models.model_inputs import feeder
from bs_exp.models.saving import save_model
from bs_exp.models.tiny import byte_tokenizer
from bs_exp.testing.models import Tokens, updated
from bs_exp.types import LoadedModel, Statistic, Task
from bs_exp.update.none import NoUpdate
from tests.support.gathered import gathered

TOKENS = {"vocab_size": 300, "pad_token_id": 256, "eos_token_id": 256, "bos_token_id": 257}
# Its queries are pooled, so they read other inputs than keys and values do.
FUNNEL_ROLES = {
    **{f"{name}_head": f"cross_{name}" for name in "qkv"},
    **{"post_proj": "cross_o", "linear_1": "up", "linear_2": "down"},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "fsmt": {
        **{"langs": ["en", "de"], "src_vocab_size": 300, "tgt_vocab_size": 300, "d_model": 32},
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 3),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
        **{"max_position_embeddings": 64, "decoder_start_token_id": 256},
    },
    "funnel": {
        **{"block_sizes": [2, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
        **{"hidden_size": 32},
    },
    "llama4_text": {
        **{"hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2},
        **{"interleave_moe_layer_step": 2, "attention_chunk_size": 16},
    },
}
TASKS = {"fsmt": Task.SEQ2SEQ_LM, "funnel": Task.MASKED_LM, "llama4_text": Task.CAUSAL_LM}


def made(family: str) -> PreTrainedModel:
    auto = next(auto for auto in AUTO_CLASSES if auto.task is TASKS[family])
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SETTINGS[family], **TOKENS)
    config.is_encoder_decoder = family == "fsmt"
    module: PreTrainedModel = auto.loader.from_config(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape) if parameter.ndim > 1 else parameter)
        module.get_input_embeddings().weight[TOKENS["pad_token_id"]] = 0.0  # as Transformers' funnel sets it on loading
    return module.eval()


def loaded(family: str) -> LoadedModel:
    roles = FUNNEL_ROLES if family == "funnel" else {}
    task = TASKS[family]
    return assemble(made(family), byte_tokenizer(task), roles, source="test", name=family, task=task)


@pytest.mark.parametrize("family", SETTINGS)
def test_grams_are_those_of_the_models_own_forward_pass(family: str) -> None:
    dense, data = loaded(family), Tokens(count=4, batch_size=4).data()
    matrices = dense.architecture.matrices
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for matrix in matrices:

        def keep(module: nn.Module, arguments: tuple[torch.Tensor, ...], name: str = matrix.module) -> None:
            seen[name] = arguments[0].detach().flatten(0, -2).double()

        handles.append(dense.module.get_submodule(matrix.module).register_forward_pre_hook(keep))
    with torch.no_grad():
        dense.module(**feeder(dense, data.windows.feeding).inputs(data.windows.ids))
    for handle in handles:
        handle.remove()
    grams = gathered(dense, data, Statistic.GRAM)[Statistic.GRAM]
    assert seen.keys() == {matrix.module for matrix in matrices}
    for matrix in matrices:
        rows = seen[matrix.module]
        gram = grams[matrix.input_site]["gram"]
        torch.testing.assert_close(gram, rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_roles_of_one_site_that_read_inputs_of_other_lengths_are_refused() -> None:
    roles = {**FUNNEL_ROLES, "q_head": "q", "k_head": "k", "v_head": "v", "post_proj": "o"}
    task = Task.MASKED_LM
    dense = assemble(made("funnel"), byte_tokenizer(task), roles, source="test", name="funnel", task=task)
    with pytest.raises(CalibrationError, match=r"k_head does not read the same input .* Map it to a role with another"):
        gathered(dense, Tokens(count=2).data(), Statistic.GRAM)


@pytest.mark.parametrize("family", SETTINGS)
def test_is_compressed_saved_and_loaded(family: str, tmp_path: Path) -> None:
    dense, data = loaded(family), Tokens(count=2).data()
    compressed = updated(dense, NoUpdate()).module
    auto = next(auto for auto in AUTO_CLASSES if auto.task is TASKS[family])
    folder = save_model(compressed, dense.tokenizer, tmp_path / "model")
    again = auto.loader.from_pretrained(folder)
    inputs = feeder(dense, data.windows.feeding).inputs(data.windows.ids)
    with torch.no_grad():
        expected, found = (model(**inputs).logits for model in (compressed, again))
    assert torch.equal(found, expected)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in dense.module.parameters())


@pytest.mark.parametrize("family", SETTINGS)
def test_gradients_reach_every_matrix(family: str) -> None:
    dense, data = loaded(family), Tokens(count=2).data()
    found = gathered(dense, data, Statistic.OUTPUT_GRAM)[Statistic.OUTPUT_GRAM]
    assert all(bool(found[matrix.module]["gram"].any()) for matrix in dense.architecture.matrices)


def test_the_trunk_is_found_by_structure_where_the_prefix_misleads(tmp_path: Path) -> None:
    module: Any = made("llama4_text")
    assert module.base_model is module and trunks(module) == (module.model,)
    assert trunks(module.model) == (module.model,)
    # The compressed model is found by the trunk's own class, too.
    dense = loaded("llama4_text")
    compressed: Any = updated(dense, NoUpdate()).module
    folder = save_model(compressed, dense.tokenizer, tmp_path / "model")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = compressed.model(ids).last_hidden_state
        assert torch.equal(AutoModel.from_pretrained(folder)(ids).last_hidden_state, expected)


def test_unknown_layers_of_nested_stacks_are_listed() -> None:
    for model in (made("funnel"), FunnelModel(made("funnel").config)):
        with pytest.raises(ModelError, match="no role is known for the linear layers attention") as raised:
            find_architecture(model)
        listed = str(raised.value)
        assert "encoder.blocks.*.*.attention.q_head" in listed and "decoder.layers.*.ffn.linear_1" in listed


def test_a_model_without_any_part_without_a_head_is_refused() -> None:
    module: Any = made("llama4_text")
    module.model.get_output_embeddings = None
    module.get_output_embeddings = lambda: module.model.embed_tokens  # no part holds the embeddings without it
    with pytest.raises(ModelError, match="no submodel holds its embeddings and its blocks"):
        trunks(module)
