"""A model run from its beginning up to one block, where its blocks cannot be run one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bs_exp.models.blocks import states_of
from bs_exp.models.hooks import Hooks
from bs_exp.models.model_inputs import Inputs, hidden_states
from bs_exp.types import LoadedModel


class _Reached(Exception):  # noqa: N818  no error
    """The block has run, so nothing behind it need be computed."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


class WholeStream:
    """All batches in front of a block, as `BlockStream` has them, for every model: an encoder-decoder, for one.

    Nothing waits between blocks: each is reached from the model's beginning, which takes about `blocks / 2` passes of
    the model in all. What was changed in the blocks before is seen.
    """

    def __init__(self, model: LoadedModel, batches: Iterable[Inputs]) -> None:
        self._module = model.module
        self._blocks = [model.module.get_submodule(path) for path in model.architecture.blocks]
        self._batches = list(batches)
        self._calls: Counter[int] = Counter()  # by layer, in a pass of the model
        if self._batches:
            with Hooks() as hooks, torch.inference_mode():
                for layer, block in enumerate(self._blocks):
                    hooks.on_call(block, partial(self._count, layer))
                hidden_states(self._module, self._batches[0])

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    def run(self, layer: int, batch: int) -> Tensor:
        """What a block gives for a batch, all blocks before it having run; its last call's, of several."""
        seen = 0

        def stop(arguments: tuple[Any, ...], keywords: Any, output: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == self._calls[layer]:
                raise _Reached(states_of(output))

        with Hooks() as hooks, torch.no_grad():
            hooks.on_call(self._blocks[layer], stop)
            try:
                return hidden_states(self._module, self._batches[batch])
            except _Reached as reached:
                return reached.states

    def resident(self, layer: int) -> AbstractContextManager[None]:
        """Nothing stays: all blocks up to this one run for every batch."""
        return nullcontext()

    def advance(self, batch: int, states: Tensor) -> None:
        """Nothing waits."""

    def pass_on(self, layer: int) -> None:
        """Nothing waits."""

    def _count(self, layer: int, arguments: Any, keywords: Any, output: Any) -> None:
        self._calls[layer] += 1
