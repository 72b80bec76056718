"""What is attached is told what happens, and nothing of it stays, whatever happened."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bs_exp.models.hooks import Hooks


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def attached(module: nn.Module) -> list[Any]:
    """All that can be told from outside of hooks, other forwards, flags and gradients."""
    return [
        [(len(m._forward_hooks), len(m._forward_pre_hooks), m.__dict__.get("forward")) for m in module.modules()],
        [(p.requires_grad, p.grad, len(p._post_accumulate_grad_hooks or {})) for p in module.parameters()],
    ]


def attach_everything(hooks: Hooks, model: nn.Sequential) -> None:
    hooks.only_gradients_of(model, [model[2].weight])
    hooks.on_input(model[0], lambda inputs: None)
    hooks.on_call(model[0], lambda arguments, keywords, output: None)
    hooks.on_output_gradient(model[2], lambda inputs, gradient: None, keep_inputs=True)
    hooks.on_weight_gradient(model[2].weight, lambda gradient: None)
    hooks.run_instead(model[1], lambda states: states)
    hooks.run_instead(model[1], lambda states: 2 * states)


def test_hooks_see_inputs_calls_and_gradients() -> None:
    """Oracle: autograd."""
    model, seen = chain(), dict[str, Tensor]()
    x = torch.randn(5, 4)
    first, last = model[0], model[2]
    expected = torch.autograd.grad(model(x).square().sum(), [last.weight, last.bias])
    with Hooks() as hooks:
        hooks.on_input(first, lambda inputs: seen.update(inputs=inputs))
        hooks.on_call(first, lambda arguments, keywords, output: seen.update(argument=arguments[0], output=output))
        hooks.on_output_gradient(last, lambda i, g: seen.update(read=i, gradient=g), keep_inputs=True)
        hooks.on_output_gradient(last, lambda i, g: seen.update(nothing=i is None), keep_inputs=False)
        hooks.on_weight_gradient(last.weight, lambda gradient: seen.update(weight=gradient.clone()))
        model(x).square().sum().backward()
    assert seen["inputs"] is x and seen["argument"] is x
    assert torch.equal(seen["output"], first(x))
    assert torch.equal(seen["read"], model[:2](x)) and not seen["read"].requires_grad
    torch.testing.assert_close(seen["gradient"].sum(0), expected[1])
    torch.testing.assert_close(seen["weight"], expected[0])
    assert seen["nothing"]
    assert last.weight.grad is None  # dropped once it was seen
    assert last.bias.grad is not None


def test_only_the_chosen_weights_get_gradients() -> None:
    model = chain()
    with Hooks() as hooks:
        hooks.only_gradients_of(model, [model[2].weight])
        model(torch.randn(5, 4)).sum().backward()
        assert [p.grad is not None for p in model.parameters()] == [False, False, True, False]


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(fails: bool) -> None:
    model = chain()
    model[0].weight.requires_grad_(False)
    model[2].bias.grad = torch.ones(2)
    own = model[1].forward = lambda states: states + 1.0  # a forward of its own stays, too
    before, x = attached(model), torch.randn(5, 4)
    expected = model(x)
    if fails:
        with pytest.raises(RuntimeError, match="stop"), Hooks() as hooks:
            attach_everything(hooks, model)
            raise RuntimeError("stop")
    else:
        with Hooks() as hooks:
            attach_everything(hooks, model)
            assert attached(model) != before
            assert not torch.equal(model(x), expected)
            model(x).sum().backward()
    assert attached(model) == before
    assert model[1].forward is own
    assert torch.equal(model(x), expected)
