"""What models make of batches: as a whole, batch by batch, or block by block where their weights wait elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bs_exp.errors import ModelError
from bs_exp.models.block_stream import through_all
from bs_exp.models.blocks import Blocks
from bs_exp.models.model_inputs import Inputs, hidden_states
from bs_exp.models.offload import is_offloaded
from bs_exp.types import LoadedModel

# Tokens whose hidden states are in memory at once while the blocks of an offloaded model are read: 1 GiB at 4096
# channels of 2 bytes. The weights are read once for so many.
_TOKENS = 2**17


def logits_of(model: LoadedModel, batches: Sequence[Inputs]) -> Iterator[Float[Tensor, "windows positions vocabulary"]]:
    """The logits of batches, in their order, on the model's device."""
    return _outputs(model, batches, _logits, Blocks.logits)


def hidden_states_of(model: LoadedModel, batches: Sequence[Inputs]) -> Iterator[Float[Tensor, "windows positions d"]]:
    """The last hidden states of batches, in their order, on the model's device."""
    return _outputs(model, batches, hidden_states, Blocks.hidden)


def _outputs(
    model: LoadedModel,
    batches: Sequence[Inputs],
    whole: Callable[[PreTrainedModel, Inputs], Tensor],
    behind: Callable[[Blocks, Inputs, Tensor], Tensor],
) -> Iterator[Tensor]:
    if not batches:
        return
    run = partial(whole, model.module)
    if not is_offloaded(model.module) or not _can_walk(model, batches):
        for inputs in batches:
            with torch.inference_mode():
                found = run(inputs)
            yield found
        return
    for part in _parts(batches):
        blocks = Blocks(model)  # what it catches is for windows of one length
        stream = through_all(blocks, part)
        for position, inputs in enumerate(part):
            with torch.inference_mode():
                found = behind(blocks, inputs, stream.states(position).to(model.device))
            yield found


def _can_walk(model: LoadedModel, batches: Sequence[Inputs]) -> bool:
    first, *others = batches
    second = next((inputs for inputs in others if _shape(inputs) == _shape(first)), first)
    # Of one window each: what all blocks give is in memory at once.
    first, second = (
        {name: value[:1] if isinstance(value, Tensor) else value for name, value in inputs.items()}
        for inputs in (first, second)
    )
    try:
        Blocks(model).check(first, second)
    except ModelError:
        return False
    return True


def _parts(batches: Sequence[Inputs]) -> Iterator[list[Inputs]]:
    """Batches in a row whose windows have one length, of so many tokens together that they fit into memory."""
    part: list[Inputs] = []
    for inputs in batches:
        tokens = sum(_shape(each).numel() for each in part)
        if part and (_shape(inputs)[1] != _shape(part[0])[1] or tokens >= _TOKENS):
            yield part
            part = []
        part.append(inputs)
    if part:
        yield part


def _shape(inputs: Inputs) -> torch.Size:
    shape: torch.Size = inputs["input_ids"].shape
    return shape


def _logits(module: PreTrainedModel, inputs: Inputs) -> Tensor:
    found: Tensor = module(**inputs).logits
    return found
