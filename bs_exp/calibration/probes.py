"""Random sums of a model's outputs, whose gradients make the curvature of the cosine to them: no logits are needed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from bs_exp.errors import ConfigError
from bs_exp.models.model_inputs import Examples, Feeder, Inputs, hidden_states, window_generator
from bs_exp.models.pooling import pooled
from bs_exp.types import CalibrationData, LoadedModel, Probes

_FEW = 8  # tokens, which show what a model gives back


def probe_losses(
    examples: Examples, hidden: Float[Tensor, "windows positions d"], model: LoadedModel, probes: Probes
) -> Iterator[Tensor]:
    """`sum_t <u_t, v_t>` for each probe, u the outputs scaled to length 1, v standard normal and apart for every t.

    A factor `probes.count ** -0.5` is in it, so that Grams of the gradients, summed over the probes, are their average.
    With J the Jacobian of all u, the Gram of all gradients behind them is an unbiased estimate of `J^T J`, since
    `E[v v^T] = I`; and `||J dW||^2 / 2` is the sum of 1 - cosine over the outputs, to second order. Padding has no v.
    Draws depend on a window's own ids, not on its batch.
    A sketch of the generalised Gauss-Newton matrix: Martens (1412.1193), section 8; Hutchinson's estimator.
    """
    outputs, counted = _outputs(examples.inputs, hidden, model, probes)
    outputs = functional.normalize(outputs.float(), dim=-1)
    windows = examples.inputs["input_ids"].cpu()
    generators = [window_generator(window, probes.seed) for window in windows]
    for _ in range(probes.count):
        drawn = torch.stack([torch.randn(outputs.shape[1:], generator=generator) for generator in generators])
        directions = drawn.to(outputs.device) * counted.unsqueeze(-1)
        yield (outputs * directions).sum() * probes.count**-0.5


def outputs_of(data: CalibrationData, feed: Feeder) -> int:
    """The number of outputs that are probed on all windows: positions or, of sentence embeddings, windows."""
    count, length = data.windows.ids.shape
    return count if data.probes.of == "embedding" else count * feed.outputs(length)


def check_probes(model: LoadedModel, data: CalibrationData, feed: Feeder) -> None:
    """ConfigError if the model gives back nothing that can be probed. It reads a few tokens."""
    inputs = feed.inputs(data.windows.ids[:1, :_FEW].to(model.device))
    name, found, problem = type(model.module).__name__, None, ""
    try:
        with torch.inference_mode():
            found = hidden_states(model.module, inputs)
    except (AttributeError, TypeError) as error:
        problem = f" ({error})"
    if not (isinstance(found, Tensor) and found.ndim == 3 and found.is_floating_point()):
        got = "none" if found is None else type(found).__name__
        raise ConfigError(
            "whitening.curvature=probes needs last hidden states, a tensor of windows x positions x channels, but this "
            f"{name} gives {got}{problem}. Use whitening=gram, which needs no outputs."
        )
    if data.probes.of == "embedding" and model.pooling is None:
        raise ConfigError(
            "whitening.probed=embedding needs a sentence-transformers model, whose modules.json says how it pools; "
            f"this {name} was loaded without one. Use whitening.probed=hidden."
        )


def _outputs(inputs: Inputs, hidden: Tensor, model: LoadedModel, probes: Probes) -> tuple[Tensor, Tensor]:
    """Outputs `[windows, outputs, d]`, and 1 for each that counts, 0 for padding."""
    mask = inputs.get("attention_mask")
    if probes.of == "embedding":
        assert model.pooling is not None
        embeddings = pooled(hidden, mask, model.pooling).unsqueeze(1)
        return embeddings, torch.ones(embeddings.shape[:2], device=hidden.device)
    if mask is None or "decoder_input_ids" in inputs:  # that of an encoder-decoder is its source's
        return hidden, torch.ones(hidden.shape[:2], device=hidden.device)
    return hidden, mask.to(hidden.device, torch.float32)
