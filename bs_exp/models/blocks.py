"""A model run one block at a time: what a block reads may depend on what was changed in the blocks before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bs_exp.errors import ModelError
from bs_exp.models.architecture import blocks_of
from bs_exp.models.model_inputs import Feeder, hidden_states
from bs_exp.types import LoadedModel

_HIDDEN = "hidden_states"
# Two ways to compute the same in the model's dtype; another mask or another input is far off.
_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of a block in a forward pass of its model, and what it returned."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    output: Tensor

    @property
    def hidden(self) -> Tensor:
        """The hidden states that the block read."""
        found: Tensor = self.arguments[0] if self.arguments else self.keywords[_HIDDEN]
        return found

    def on(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """What a block makes of other hidden states, everything else being as in this call."""
        if self.arguments:
            return _hidden(block(hidden, *self.arguments[1:], **self.keywords))
        return _hidden(block(**{**self.keywords, _HIDDEN: hidden}))


def block_paths(dense: PreTrainedModel) -> tuple[str, ...]:
    """Where the blocks of a dense model, and of every compressed twin of it, are found, by layer."""
    paths = {id(module): name for name, module in dense.named_modules()}
    return tuple(paths[id(block)] for block in blocks_of(dense))


@contextmanager
def recorded(module: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Call]]:
    """The calls of the blocks at these paths, filled in as the model runs."""
    calls: dict[str, Call] = {}

    def hook(path: str) -> Callable[..., None]:
        def record(block: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any], output: Any) -> None:
            calls[path] = Call(arguments, keywords, _hidden(output))

        return record

    handles = [module.get_submodule(p).register_forward_hook(hook(p), with_kwargs=True) for p in paths]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class BlockStream:
    """The hidden states of all batches in front of a block, carried on by one block after the other.

    They lie in the CPU's memory, in the model's dtype. Everything else that a block is given (masks, positions) is
    that of one pass through the model. ModelError if the blocks of the model cannot be run this way.
    """

    def __init__(
        self,
        model: LoadedModel,
        feeder: Feeder,
        paths: Sequence[str],
        batches: Sequence[Tensor],
        *,
        check: bool = True,
    ) -> None:
        self.batches = batches
        self._model = model
        self._feeder = feeder
        self._paths = paths
        self._calls: dict[int, list[Call]] = {}
        for batch in batches:
            if len(batch) not in self._calls:
                self._calls[len(batch)] = [_without_states(call) for call in self._pass(batch)]
        if check:
            self._check()
        self._states = [self._embedded(batch) for batch in batches]

    def run(self, layer: int, batch: int) -> Tensor:
        """What the block makes of the states of a batch in front of it."""
        block = self._model.module.get_submodule(self._paths[layer])
        states = self._states[batch].to(self._model.device)
        with torch.no_grad():
            return self._calls[len(states)][layer].on(block, states)

    def advance(self, batch: int, states: Tensor) -> None:
        """Puts a batch in front of the next block."""
        self._states[batch] = states.cpu()

    def _pass(self, batch: Tensor) -> list[Call]:
        """The blocks' calls in a pass of a batch through the model."""
        module: PreTrainedModel = self._model.module
        with torch.no_grad(), recorded(module, self._paths) as calls:
            hidden_states(module, self._feeder.inputs(batch.to(self._model.device)))
        if missing := [path for path in self._paths if path not in calls]:
            raise self._refusal(f"{missing[0]} did not run")
        return [calls[path] for path in self._paths]

    def _embedded(self, batch: Tensor) -> Tensor:
        """What the first block reads of a batch; no block runs."""

        def stop(block: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
            raise _FirstBlockReached(Call(arguments, keywords, torch.empty(0)).hidden)

        module: PreTrainedModel = self._model.module
        handle = module.get_submodule(self._paths[0]).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad():
                hidden_states(module, self._feeder.inputs(batch.to(self._model.device)))
        except _FirstBlockReached as reached:
            return reached.hidden.cpu()
        finally:
            handle.remove()
        raise self._refusal(f"{self._paths[0]} did not run")

    def _check(self) -> None:
        """Compares a chain of blocks with a pass of the model, on another batch than the recorded one if there is."""
        batch = next((b for b in self.batches[1:] if len(b) == len(self.batches[0])), self.batches[0])
        calls = self._pass(batch)
        states = calls[0].hidden
        for layer, (path, call) in enumerate(zip(self._paths, calls, strict=True)):
            with torch.no_grad():
                block = self._model.module.get_submodule(path)
                same_input = call.hidden.shape == states.shape and _close(states, call.hidden)
                if not same_input:
                    raise self._refusal(f"something happens between its blocks, in front of {path}")
                states = self._calls[len(batch)][layer].on(block, call.hidden)
            if not _close(states, call.output):
                raise self._refusal(f"{path} reads more than the hidden states of the block before it")

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(
            f"The blocks of this {type(self._model.module).__name__} cannot be run one at a time: {reason}. For the "
            "refit use update.mode=one_shot with update.target=compressed_inputs, which runs the model as a whole; "
            "update=none leaves it out."
        )


class _FirstBlockReached(Exception):  # noqa: N818  no error
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _hidden(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _without_states(call: Call) -> Call:
    """The call without the large tensors that are not used again."""
    empty = torch.empty(0)
    if call.arguments:
        return replace(call, arguments=(empty, *call.arguments[1:]), output=empty)
    return replace(call, keywords={**call.keywords, _HIDDEN: empty}, output=empty)


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= _TOLERANCE * expected.norm())
