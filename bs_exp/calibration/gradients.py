"""One forward and backward pass over the calibration windows: Grams of the loss gradients at the matrices' outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from bs_exp.errors import CalibrationError
from bs_exp.journal import Journal
from bs_exp.types import LoadedModel, TokenWindows


def gather_output_grams(
    model: LoadedModel, windows: TokenWindows, *, batch_size: int, journal: Journal
) -> Mapping[str, Float[Tensor, "d_out d_out"]]:
    """`sum_t g_t g_t^T` by module, with `g_t` the gradient of the summed token loss at the module's output.

    The labels are the text's own next tokens (empirical Fisher). No parameter gets a gradient: backward runs through
    activations only. Products in fp32, accumulated in fp64 on the CPU. Hooks and `requires_grad` flags are as before
    afterwards, whatever happened. Raises CalibrationError if gradients are not finite.
    """
    modules = {m.module: model.module.get_submodule(m.module) for m in model.architecture.matrices}
    grams = {m.module: torch.zeros(m.d_out, m.d_out, dtype=torch.float64) for m in model.architecture.matrices}
    batches = windows.ids.split(batch_size)
    with _activation_gradients(model.module), _hooks(modules, grams):
        for batch in journal.track(batches, label="output gradients", total=len(batches)):
            ids = batch.to(model.device)
            logits = model.module(input_ids=ids, use_cache=False).logits
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
            loss.backward()
    broken = [name for name, gram in grams.items() if not bool(gram.diagonal().isfinite().all())]
    if broken:
        raise CalibrationError(
            f"The loss gradients at {broken[-1]} hold NaN or infinite values on the calibration text. Load the model "
            "in another dtype (model.dtype=float32 or bfloat16), or check its weights."
        )
    return grams


@contextmanager
def _activation_gradients(module: Any) -> Iterator[None]:
    """Gradients for activations and for no parameter: the embeddings' output starts the graph."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    embeddings: nn.Module = module.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda layer, arguments, output: output.requires_grad_())
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _hooks(modules: Mapping[str, nn.Module], grams: dict[str, Tensor]) -> Iterator[None]:
    def watch(name: str) -> Any:
        def accumulate(gradient: Tensor) -> None:
            rows = gradient.reshape(-1, gradient.shape[-1]).float()
            grams[name] += (rows.mT @ rows).double().cpu()

        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            output.register_hook(accumulate)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
