"""Blocks that are run one at a time do what they do in the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bs_exp.errors import ModelError
from bs_exp.models.blocks import BlockStream, block_paths, recorded
from bs_exp.models.model_inputs import feeder, hidden_states
from bs_exp.models.tiny import FAMILIES, TinyRandom, tiny_random
from bs_exp.types import Task

IDS = torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chain_of_blocks_is_the_model(family: str) -> None:
    """Or it is refused: an encoder-decoder's blocks read more than the block in front of them."""
    model = tiny_random(family)
    paths, feed = block_paths(model.module), feeder(model)
    if model.task is Task.SEQ2SEQ_LM:
        with pytest.raises(ModelError, match="cannot be run one at a time"):
            BlockStream(model, feed, paths, IDS.split(2))
        return
    stream = BlockStream(model, feed, paths, IDS.split(2))  # the last batch is smaller
    for batch, ids in enumerate(IDS.split(2)):
        with torch.no_grad(), recorded(model.module, paths) as calls:
            hidden_states(model.module, feed.inputs(ids))
        for layer, path in enumerate(paths):
            states = stream.run(layer, batch)
            torch.testing.assert_close(states, calls[path].output, rtol=1e-4, atol=1e-5)
            stream.advance(batch, states)


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
        BlockStream(model, feeder(model), block_paths(model.module), IDS.split(2)[:2])


def test_hooks_are_gone_afterwards() -> None:
    model = TinyRandom().load()
    paths = block_paths(model.module)
    BlockStream(model, feeder(model), paths, IDS.split(2))
    with pytest.raises(RuntimeError, match="stop"), recorded(model.module, paths):
        raise RuntimeError("stop")
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.module.modules())
