"""One forward pass over the calibration windows: what is known of the inputs at every input site."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bs_exp.errors import CalibrationError
from bs_exp.models.model_inputs import feeder, hidden_states
from bs_exp.progress import Progress
from bs_exp.types import CalibrationData, LoadedModel, Statistic, WeightMatrix

Grams = Mapping[str, Float[Tensor, "d_in d_in"]]


def gather_grams(model: LoadedModel, data: CalibrationData, *, progress: Progress) -> Grams:
    """`X^T X` by input site, summed over all tokens; see `gather_inputs`."""
    found = gather_inputs(model, data, {Statistic.GRAM}, progress=progress)
    return {site: tensors["gram"] for site, tensors in found[Statistic.GRAM].items()}


def gather_inputs(
    model: LoadedModel, data: CalibrationData, statistics: Set[Statistic], *, progress: Progress
) -> Mapping[Statistic, Mapping[str, Mapping[str, Tensor]]]:
    """Tensors by statistic (of `ACCUMULATORS`) and input site: products in fp32, accumulated in fp64, on the CPU.

    No logits are computed. Hooks are gone afterwards, whatever happened.
    Raises CalibrationError if activations are not finite, or matrices of one site read different inputs.
    """
    sites: dict[str, list[WeightMatrix]] = defaultdict(list)
    for matrix in model.architecture.matrices:
        sites[matrix.input_site].append(matrix)
    sums = {site: {s: ACCUMULATORS[s](m[0].d_in) for s in sorted(statistics)} for site, m in sites.items()}
    reader = feeder(model, data.windows.feeding)
    batches = data.batches
    with torch.inference_mode(), _hooks(model.module, sites, sums):
        for batch in progress.track(batches, label="calibrating", total=len(batches)):
            hidden_states(model.module, reader.inputs(batch.to(model.device)))
    found = {s: {site: sums[site][s].tensors() for site in sites} for s in sorted(statistics)}
    for site, matrices in sites.items():
        for by_site in found.values():
            _check(by_site[site], matrices)
    return found


class Accumulator(Protocol):
    """What is kept of the inputs at one site."""

    def add(self, rows: Float[Tensor, "tokens d_in"]) -> None:
        """Takes the fp32 inputs of a batch."""

    def tensors(self) -> dict[str, Tensor]:
        """What was found, by name."""


class GramSum:
    """`gram`: `X^T X`; `tokens`: the number of inputs."""

    def __init__(self, channels: int) -> None:
        self._gram = torch.zeros(channels, channels, dtype=torch.float64)
        self._tokens = 0

    def add(self, rows: Tensor) -> None:
        self._gram += (rows.mT @ rows).double().cpu()
        self._tokens += len(rows)

    def tensors(self) -> dict[str, Tensor]:
        return {"gram": self._gram, "tokens": torch.tensor(self._tokens)}


class MomentSums:
    """By channel: `absolute`, the mean of |x|; `peak`, its maximum; `fourth`, the mean of x^4."""

    def __init__(self, channels: int) -> None:
        self._tokens = 0
        self._absolute, self._peak, self._fourth = torch.zeros(3, channels, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        sizes = rows.abs()
        self._tokens += len(rows)
        self._absolute += sizes.sum(0).double().cpu()
        self._peak = torch.maximum(self._peak, sizes.amax(0).double().cpu())
        self._fourth += sizes.square().square().sum(0).double().cpu()

    def tensors(self) -> dict[str, Tensor]:
        return {
            "absolute": self._absolute / max(self._tokens, 1),
            "peak": self._peak,
            "fourth": self._fourth / max(self._tokens, 1),
        }


ACCUMULATORS: Mapping[Statistic, type[GramSum] | type[MomentSums]] = {
    Statistic.GRAM: GramSum,
    Statistic.INPUT_MOMENTS: MomentSums,
}


@contextmanager
def _hooks(
    module: nn.Module,
    sites: Mapping[str, Sequence[WeightMatrix]],
    sums: Mapping[str, Mapping[Statistic, Accumulator]],
) -> Iterator[None]:
    """Hooks that accumulate the inputs of each site's first matrix, and compare the inputs of its others once."""
    handles: list[RemovableHandle] = []
    try:
        for site, (first, *others) in sites.items():
            watch = _SiteWatch(site, tuple(sums[site].values()))
            handles.append(module.get_submodule(first.module).register_forward_pre_hook(watch.accumulate))
            handles.extend(module.get_submodule(m.module).register_forward_pre_hook(watch.compare(m)) for m in others)
        yield
    finally:
        for handle in handles:
            handle.remove()


class _SiteWatch:
    """What has run through one input site."""

    def __init__(self, site: str, sums: Sequence[Accumulator]) -> None:
        self._site = site
        self._sums = sums
        self._first_input: Tensor | None = None
        self._compared: set[str] = set()

    def accumulate(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs = arguments[0]
        self._first_input = inputs
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        for accumulator in self._sums:
            accumulator.add(rows)

    def compare(self, matrix: WeightMatrix) -> Any:
        """A hook that checks, in the first batch, that a matrix reads what the site's first matrix reads."""

        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if matrix.module in self._compared:
                return
            self._compared.add(matrix.module)
            # NaN equals NaN here: it is reported for what it is, once all inputs were seen.
            if self._first_input is None or not torch.allclose(
                arguments[0], self._first_input, rtol=0.0, atol=0.0, equal_nan=True
            ):
                raise CalibrationError(
                    f"{matrix.module} does not read the same input as the other matrices of site {self._site}. "
                    "Map it to a role with another input site in model.roles."
                )

        return hook


def _check(tensors: Mapping[str, Tensor], matrices: Sequence[WeightMatrix]) -> None:
    # What is infinite anywhere in a Gram is infinite on its diagonal.
    seen = [tensor.diagonal() if tensor.dim() == 2 else tensor for tensor in tensors.values()]
    if not all(bool(tensor.isfinite().all()) for tensor in seen):
        names = ", ".join(m.module for m in matrices)
        raise CalibrationError(
            f"The inputs of {names} hold NaN or infinite values on the calibration text, so everything behind them is "
            "lost too. Load the model in another dtype (model.dtype=float32 or bfloat16), or check its weights."
        )
