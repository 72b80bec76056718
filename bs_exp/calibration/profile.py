"""What calibration finds of whole blocks: how sensitive the loss is to their weights, and how their outputs spread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bs_exp.cache import content_key
from bs_exp.calibration.checkpointing import is_large, recomputed_blocks
from bs_exp.calibration.statistics import statistics_key
from bs_exp.errors import CalibrationError
from bs_exp.models.architecture import blocks_of, module_of
from bs_exp.models.model_inputs import feeder, hidden_states
from bs_exp.progress import Progress
from bs_exp.types import CalibrationData, LayerProfile, LoadedModel, Statistic
from bs_exp.workspace import Workspace

OF_BLOCKS = frozenset({Statistic.SENSITIVITY, Statistic.BLOCK_OUTPUTS})


def profile_blocks(
    model: LoadedModel,
    data: CalibrationData,
    *,
    needs: Set[Statistic],
    workspace: Workspace,
) -> LayerProfile:
    """The needed statistics of a dense model's blocks; from the cache where it has them."""
    key = statistics_key(model, data)

    def found_or_gathered(statistic: Statistic, gather: Callable[..., Tensor]) -> Tensor | None:
        if statistic not in needs:
            return None
        # The targeted matrices are part of the key: roles can leave some of them out.
        entry_key = content_key(statistics=key, matrices=[m.module for m in model.architecture.matrices])
        entry = workspace.cache.find(statistic, entry_key)
        if entry is None:
            values = gather(model, data, progress=workspace.progress)
            entry = workspace.cache.store(statistic, entry_key, {"values": values})
        return entry.tensor("values")

    outputs = found_or_gathered(Statistic.BLOCK_OUTPUTS, gather_output_singular_values)
    return LayerProfile(
        sensitivity=found_or_gathered(Statistic.SENSITIVITY, gather_sensitivity),
        output_singular_values=None if outputs is None else dict(enumerate(outputs)),
    )


def gather_sensitivity(model: LoadedModel, data: CalibrationData, *, progress: Progress) -> Float[Tensor, " layers"]:
    """`sum ||dLoss/dW||_F / ||W||_F` over each block's targeted matrices; the loss is a batch's mean token loss.

    Averaged over batches, as the official code does, so it depends on their size: the noise of a batch's gradient is
    part of its norm. A gradient is dropped as soon as it is measured, so that one matrix's exists at a time. Flags and
    gradients of the parameters are as before afterwards, whatever happened.
    Raises CalibrationError if a gradient is not finite. DipSVD (2506.20353).
    """
    sensitivity = torch.zeros(model.architecture.num_layers, dtype=torch.float64)
    layers = {module_of(model.module, m).weight: m.layer for m in model.architecture.matrices}
    reader = feeder(model, data.windows.feeding)
    batches = data.batches

    def measure(weight: Tensor) -> None:
        assert weight.grad is not None
        size = float(weight.detach().float().norm())
        # A matrix of zeros has no relative change; the official code's 1e-8 keeps it finite.
        sensitivity[layers[weight]] += float(weight.grad.float().norm()) / (size + 1e-8) / len(batches)
        weight.grad = None

    recompute = recomputed_blocks(model) if is_large(model) else nullcontext()
    with _gradients_of(model.module, tuple(layers), measure), recompute:
        for batch in progress.track(batches, label="sensitivity", total=len(batches)):
            examples = reader.examples(batch.to(model.device))
            examples.loss(model.module(**examples.inputs).logits, reduction="mean").backward()
    if not bool(sensitivity.isfinite().all()):
        layer = int((~sensitivity.isfinite()).int().argmax())
        raise CalibrationError(
            f"The loss gradients of layer {layer} hold NaN or infinite values on the calibration text. Load the model "
            "in another dtype (model.dtype=float32 or bfloat16), or check its weights."
        )
    return sensitivity


def gather_output_singular_values(
    model: LoadedModel, data: CalibrationData, *, progress: Progress
) -> Float[Tensor, "layers channels"]:
    """Singular values, falling, of every block's outputs (all tokens x channels), from their Gram in fp64.

    fp64 in the products too: a sum of singular values hears the small ones, and squares in fp32 bury them under the
    few large channels that language models have. No logits are computed; hooks are gone afterwards.
    Raises CalibrationError if an output is not finite.
    """
    blocks = blocks_of(model.module)
    grams: dict[int, Tensor] = {}
    reader = feeder(model, data.windows.feeding)
    batches = data.batches
    with torch.inference_mode(), _outputs(blocks, grams):
        for batch in progress.track(batches, label="block outputs", total=len(batches)):
            hidden_states(model.module, reader.inputs(batch.to(model.device)))
    values = []
    for layer, gram in sorted(grams.items()):
        if not bool(gram.diagonal().isfinite().all()):
            raise CalibrationError(
                f"The outputs of layer {layer} hold NaN or infinite values on the calibration text. Load the model in "
                "another dtype (model.dtype=float32 or bfloat16), or check its weights."
            )
        values.append(torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt().flip(0))
    return torch.stack(values)


@contextmanager
def _gradients_of(module: nn.Module, weights: Sequence[Tensor], measure: Callable[[Tensor], None]) -> Iterator[None]:
    """Gradients for these weights and for no other parameter, each handed over once it is complete."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
    handles = []
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for weight in weights:
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(measure))
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


@contextmanager
def _outputs(blocks: Sequence[nn.Module], grams: dict[int, Tensor]) -> Iterator[None]:
    """Hooks that accumulate the Gram of every block's hidden states, in fp64 on the CPU."""

    def watch(layer: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            rows = hidden.reshape(-1, hidden.shape[-1]).double()
            gram = (rows.mT @ rows).cpu()
            grams[layer] = grams[layer] + gram if layer in grams else gram

        return hook

    handles = [block.register_forward_hook(watch(layer)) for layer, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
