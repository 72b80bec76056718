"""Blocks that are run one at a time do what they do in the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AlbertConfig, AlbertForMaskedLM

from bs_exp.errors import ModelError
from bs_exp.models.blocks import Blocks, recorded
from bs_exp.models.loading import assemble
from bs_exp.models.model_inputs import feeder, hidden_states
from bs_exp.models.surgery import twin
from bs_exp.models.tiny import ENCODER_DECODERS, ENCODERS, FAMILIES, TinyRandom, byte_tokenizer, tiny_random
from bs_exp.types import LoadedModel, Task

IDS = torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(0))


def check(model: LoadedModel) -> Blocks:
    blocks, feed = Blocks(model), feeder(model)
    blocks.check(feed.inputs(IDS[:1]), feed.inputs(IDS[1:2]))
    return blocks


@pytest.mark.parametrize("family", (*FAMILIES, *ENCODERS))
def test_a_chain_of_blocks_is_the_model(family: str) -> None:
    """Bit for bit: in front of the blocks, block by block, and behind them."""
    model = tiny_random(family)
    paths, feed, blocks = model.architecture.blocks, feeder(model), check(model)
    for ids in IDS.split(2):  # the last batch is smaller
        inputs = feed.inputs(ids)
        with torch.no_grad():
            with recorded(model.module, paths) as calls:
                logits = model.module(**inputs).logits
            states = blocks.embedded(inputs)
            assert torch.equal(states, calls[paths[0]].hidden)
            for layer, path in enumerate(paths):
                states = blocks.run(layer, states)
                assert torch.equal(states, calls[path].output)
            assert torch.equal(blocks.logits(inputs, states), logits)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_encoder_decoder_is_refused(family: str) -> None:
    """Its decoder reads more than the block in front."""
    with pytest.raises(ModelError, match=r"cannot be run one at a time: something happens between its blocks"):
        check(tiny_random(family))


def test_a_block_that_is_handed_something_of_the_text_is_refused() -> None:
    """Arguments beside the hidden states are taken from one pass, which must hold for another text."""
    model = tiny_random()
    block, embeddings = model.module.model.layers[1], []
    forward = block.forward

    def hand_over(module: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        return arguments, {"embedded": embeddings[-1], **keywords}

    model.module.model.embed_tokens.register_forward_hook(lambda layer, args, output: embeddings.append(output))
    block.register_forward_pre_hook(hand_over, with_kwargs=True)
    block.forward = lambda hidden, embedded, **keywords: forward(hidden, **keywords) + embedded
    with pytest.raises(ModelError, match=r"layers\.1 reads more than the hidden states"):
        check(model)


def test_a_block_that_runs_several_times_is_refused() -> None:
    """ALBERT goes through one block once for every layer."""
    sizes = {"hidden_size": 32, "embedding_size": 16, "num_attention_heads": 4, "intermediate_size": 48}
    module = AlbertForMaskedLM(AlbertConfig(vocab_size=258, num_hidden_layers=3, pad_token_id=256, **sizes))
    tokenizer = byte_tokenizer(Task.MASKED_LM)
    with pytest.raises(ModelError, match=r"albert_layer_groups\.0 runs more than once"):
        check(assemble(module.eval(), tokenizer, None, source="test", name="albert", task=Task.MASKED_LM))


def test_a_model_that_reads_more_than_its_last_block_is_refused() -> None:
    model = tiny_random()
    trunk, seen = model.module.model, []
    trunk.layers[0].register_forward_hook(lambda layer, arguments, output: seen.append(output))
    trunk.norm.register_forward_pre_hook(lambda layer, arguments: (arguments[0] + seen[-1],))
    with pytest.raises(ModelError, match=r"more than the output of model\.layers\.2 is read behind its blocks"):
        check(model)


@pytest.mark.parametrize("family", (*FAMILIES, *ENCODERS, *ENCODER_DECODERS))
def test_the_architecture_names_the_blocks_of_all_twins(family: str) -> None:
    model = tiny_random(family)
    architecture, made = model.architecture, twin(model.module)
    assert len(architecture.blocks) == architecture.num_layers
    assert all(m.module.startswith(f"{architecture.blocks[m.layer]}.") for m in architecture.matrices)
    with torch.no_grad(), recorded(made, architecture.blocks) as calls:
        hidden_states(made, feeder(model).inputs(IDS))
    assert calls.keys() == set(architecture.blocks)


@pytest.mark.parametrize(("family", "first"), [("llama", "model.layers.0"), ("gpt2", "transformer.h.0")])
def test_blocks_are_found_by_layer(family: str, first: str) -> None:
    assert tiny_random(family).architecture.blocks[0] == first


def test_hooks_are_gone_afterwards() -> None:
    model = TinyRandom().load()
    blocks = check(model)
    with pytest.raises(RuntimeError, match="stop"), recorded(model.module, model.architecture.blocks):
        raise RuntimeError("stop")
    with pytest.raises(IndexError):
        blocks.embedded(feeder(model).inputs(IDS + 10**6))
    with pytest.raises(RuntimeError):
        blocks.logits(feeder(model).inputs(IDS), torch.zeros(5, 12, 7))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.module.modules())
    assert all("forward" not in m.__dict__ for m in model.module.modules())
