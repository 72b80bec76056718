"""A model run one block at a time: what a block reads may depend on what was changed in the blocks before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bs_exp.errors import ModelError
from bs_exp.models.hooks import Hooks
from bs_exp.models.mapped import announce
from bs_exp.models.model_inputs import Inputs, hidden_states
from bs_exp.models.offload import head_of, passing, resident
from bs_exp.types import LoadedModel

_HIDDEN = "hidden_states"
# Two ways to compute the same in the model's dtype; another mask or another input is far off.
_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of a block in a forward pass of its model, and the hidden states that it returned.

    `members` is the length of the tuple that it returned them in (first), 0 if it returned a tensor.
    """

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    output: Tensor
    members: int = 0

    @property
    def hidden(self) -> Tensor:
        """The hidden states that the block read."""
        found: Tensor = self.arguments[0] if self.arguments else self.keywords[_HIDDEN]
        return found

    def on(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """What a block makes of other hidden states, everything else being as in this call."""
        if self.arguments:
            return states_of(block(hidden, *self.arguments[1:], **self.keywords))
        return states_of(block(**{**self.keywords, _HIDDEN: hidden}))

    def returning(self, hidden: Tensor) -> Any:
        """Other hidden states, in the form in which the block returned its own."""
        return (hidden, *[None] * (self.members - 1)) if self.members else hidden

    def without_states(self) -> Call:
        """The call without the hidden states: what the block is given besides."""
        empty = torch.empty(0)
        if self.arguments:
            return replace(self, arguments=(empty, *self.arguments[1:]), output=empty)
        return replace(self, keywords={**self.keywords, _HIDDEN: empty}, output=empty)


def states_of(output: Any) -> Tensor:
    """The hidden states among what a block returned."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


@contextmanager
def recorded(module: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Call]]:
    """The calls of the blocks at these paths, filled in as the model runs; of several calls of a block the last."""
    calls: dict[str, Call] = {}

    def record(path: str, arguments: tuple[Any, ...], keywords: Mapping[str, Any], output: Any) -> None:
        members = len(output) if isinstance(output, tuple) else 0
        calls[path] = Call(arguments, keywords, states_of(output), members)

    with Hooks() as hooks:
        for path in paths:
            hooks.on_call(module.get_submodule(path), lambda *call, path=path: record(path, *call))
        yield calls


class Blocks:
    """The blocks of a model, each of which can be run alone on hidden states (windows x positions x channels).

    Whatever else a block is given (masks, positions, rotary tables) is what the model's own forward hands it: caught
    once for every number of windows, so all windows must be of one length and without padding. Parts of the model in
    front of the blocks and behind them run in its own forward, in which the blocks pass on what they are given.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._paths = model.architecture.blocks
        self._modules = [model.module.get_submodule(path) for path in self._paths]
        self._calls: dict[int, list[Call]] = {}
        self._forms: list[Call] = []
        self._latest = -1

    def __len__(self) -> int:
        return len(self._paths)

    def embedded(self, inputs: Inputs) -> Float[Tensor, "windows positions channels"]:
        """What the first block reads, on the model's device; no block runs. Needed once before `run` and `logits`."""
        if not self._forms:
            one = {name: value[:1] if isinstance(value, Tensor) else value for name, value in inputs.items()}
            self._forms = [call.without_states() for call in self._pass(one)[0]]
        with Hooks() as hooks:
            self._pass_on(hooks)
            calls, _ = self._pass(inputs)
        states = calls[0].hidden
        self._calls.setdefault(len(states), [call.without_states() for call in calls])
        return states

    @contextmanager
    def resident(self, layer: int) -> Iterator[None]:
        """The weights of a block are on the model's device meanwhile; where they wait elsewhere, they come once.

        Where they lie in files, those of the next block on the way are read meanwhile: the one behind it or, on the way
        back, which begins at the last one, that in front of it.
        """
        before, self._latest = self._latest, layer
        follows = layer + 1 if layer > before else layer - 1
        stays = layer == before and layer < len(self) - 1  # the same block again
        with resident(self._modules[layer]):
            if not stays and 0 <= follows < len(self):
                announce(self._modules[follows].parameters())
            yield

    @contextmanager
    def resident_head(self) -> Iterator[None]:
        """The weights of the head as those of a `resident` block meanwhile."""
        with resident(head_of(self._model.module)):
            yield

    def run(self, layer: int, states: Tensor) -> Float[Tensor, "windows positions channels"]:
        """What a block makes of the states in front of it, on the model's device."""
        return self._calls[len(states)][layer].on(self._modules[layer], states.to(self._model.device))

    def logits(self, inputs: Inputs, states: Tensor) -> Float[Tensor, "windows positions vocabulary"]:
        """What the model makes of the states behind its last block; no block runs."""
        with Hooks() as hooks:
            self._pass_on(hooks, states)
            found: Tensor = self._model.module(**inputs).logits
        return found

    def hidden(self, inputs: Inputs, states: Tensor) -> Float[Tensor, "windows positions channels"]:
        """The last hidden states, given those behind the last block; no block runs."""
        with Hooks() as hooks:
            self._pass_on(hooks, states)
            return hidden_states(self._model.module, inputs)

    def check(self, first: Inputs, second: Inputs) -> None:
        """ModelError if a chain of blocks is not the model: what is caught on the first inputs is used on the second.

        Both must be of one shape.
        """
        calls, expected = self._pass(second)
        self._forms = [call.without_states() for call in calls]
        for (_, before), (path, call) in pairwise(zip(self._paths, calls, strict=True)):
            if not _close(call.hidden, before.output):
                raise self._refusal(f"something happens between its blocks, in front of {path}")
        self.embedded(first)
        if not _close(self.embedded(second), calls[0].hidden):
            raise self._refusal(f"{self._paths[0]} runs more than once")
        with torch.no_grad():
            for layer, (path, call) in enumerate(zip(self._paths, calls, strict=True)):
                if not _close(self.run(layer, call.hidden), call.output):
                    raise self._refusal(f"{path} reads more than the hidden states of the block before it")
            found = self.hidden(second, calls[-1].output)
        if not _close(found, expected):
            raise self._refusal(f"more than the output of {self._paths[-1]} is read behind its blocks")

    def _pass(self, inputs: Inputs) -> tuple[list[Call], Tensor]:
        """The blocks' calls in a pass through the model, by layer, and its last hidden states."""
        with torch.no_grad(), recorded(self._model.module, self._paths) as calls:
            states = hidden_states(self._model.module, inputs)
        if missing := [path for path in self._paths if path not in calls]:
            raise self._refusal(f"{missing[0]} did not run")
        return [calls[path] for path in self._paths], states

    def _pass_on(self, hooks: Hooks, last: Tensor | None = None) -> None:
        """Blocks return what they are given, and the last one `last`, if that is given."""
        for module, form in zip(self._modules, self._forms, strict=True):
            hooks.during(passing(module))
            hooks.run_instead(module, lambda *a, form=form, **k: form.returning(Call(a, k, torch.empty(0)).hidden))
        if last is not None:
            hooks.run_instead(self._modules[-1], lambda *a, **k: self._forms[-1].returning(last))

    def _refusal(self, reason: str) -> ModelError:
        name = type(self._model.module).__name__
        return ModelError(f"The blocks of this {name} cannot be run one at a time: {reason}.")


def _close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).norm() <= _TOLERANCE * expected.norm())
