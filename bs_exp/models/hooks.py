"""What is attached to a model while it runs: hooks, other forwards and flags, by one manager that takes them off."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn


class Hooks:
    """A context in which callbacks may be attached to modules and weights of a model.

    All of them are gone at the end of the `with` block, whatever happened in it, and what was changed is as before.
    """

    def __init__(self) -> None:
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def on_input(self, module: nn.Module, see: Callable[[Tensor], None]) -> None:
        """Before every call of a module, `see` gets its first argument."""

        def hook(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
            see(arguments[0])

        self._undo.callback(module.register_forward_pre_hook(hook).remove)

    def on_call(self, module: nn.Module, see: Callable[[tuple[Any, ...], Mapping[str, Any], Any], None]) -> None:
        """After every call of a module, `see` gets its arguments, its keyword arguments, and what it returned."""

        def hook(layer: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any], output: Any) -> None:
            see(arguments, keywords, output)

        self._undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

    def on_output_gradient(
        self, module: nn.Module, see: Callable[[Tensor | None, Tensor], None], *, keep_inputs: bool
    ) -> None:
        """In the backward pass, `see` gets the gradient at the output of every call of a module, after its first
        argument; None in place of that unless `keep_inputs`, which keeps it in memory until then."""

        def watch(arguments: tuple[Any, ...], keywords: Mapping[str, Any], output: Tensor) -> None:
            inputs = arguments[0].detach() if keep_inputs else None
            output.register_hook(lambda gradient: see(inputs, gradient))

        self.on_call(module, watch)

    def on_weight_gradient(self, weight: Tensor, see: Callable[[Tensor], None]) -> None:
        """In the backward pass, `see` gets the gradient of a weight once it is complete; it is dropped afterwards."""

        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            see(parameter.grad)
            parameter.grad = None

        self._undo.callback(weight.register_post_accumulate_grad_hook(hook).remove)

    def run_instead(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Calls of a module run another function."""
        own = module.__dict__.get("forward")

        def restore() -> None:
            if own is None:
                del module.forward  # the class's own shows again
            else:
                module.__dict__["forward"] = own

        self._undo.callback(restore)
        module.__dict__["forward"] = forward

    def during(self, state: AbstractContextManager[Any]) -> None:
        """A state of something in the model lasts as long as the hooks."""
        self._undo.enter_context(state)

    def only_gradients_of(self, module: nn.Module, weights: Collection[Tensor]) -> None:
        """Of all parameters, these alone get gradients. Flags and gradients are as before afterwards."""
        for parameter in module.parameters():
            self._undo.callback(_set_gradient, parameter, parameter.requires_grad, parameter.grad)
            _set_gradient(parameter, False, None)
        for weight in weights:
            weight.requires_grad_(True)


def _set_gradient(parameter: nn.Parameter, required: bool, gradient: Tensor | None) -> None:
    parameter.requires_grad_(required)
    parameter.grad = gradient
