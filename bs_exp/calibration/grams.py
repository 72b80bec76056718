"""One pass over the calibration windows: the Gram `X^T X` of every input site."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bs_exp.errors import CalibrationError
from bs_exp.journal import Journal
from bs_exp.models.architecture import backbone
from bs_exp.types import LoadedModel, TokenWindows, WeightMatrix

Grams = Mapping[str, Float[Tensor, "d_in d_in"]]


def gather_grams(model: LoadedModel, windows: TokenWindows, *, batch_size: int, journal: Journal) -> Grams:
    """`X^T X` by input site, summed over all tokens: products in fp32, accumulated in fp64, on the CPU.

    No logits are computed. Hooks are gone afterwards, whatever happened.
    Raises CalibrationError if activations are not finite, or matrices of one site read different inputs.
    """
    sites: dict[str, list[WeightMatrix]] = defaultdict(list)
    for matrix in model.architecture.matrices:
        sites[matrix.input_site].append(matrix)
    grams = {site: torch.zeros(m[0].d_in, m[0].d_in, dtype=torch.float64) for site, m in sites.items()}
    network = backbone(model.module)
    batches = windows.ids.split(batch_size)
    with torch.inference_mode(), _hooks(model.module, sites, grams):
        for batch in journal.track(batches, label="calibrating", total=len(batches)):
            network(input_ids=batch.to(model.device), use_cache=False)
    for site, matrices in sites.items():
        _check(grams[site], matrices)
    return grams


@contextmanager
def _hooks(module: nn.Module, sites: Mapping[str, Sequence[WeightMatrix]], grams: dict[str, Tensor]) -> Iterator[None]:
    """Hooks that accumulate the Gram of each site's first matrix, and compare the inputs of its others once."""
    handles: list[RemovableHandle] = []
    try:
        for site, (first, *others) in sites.items():
            watch = _SiteWatch(site, grams[site])
            handles.append(module.get_submodule(first.module).register_forward_pre_hook(watch.accumulate))
            handles.extend(module.get_submodule(m.module).register_forward_pre_hook(watch.compare(m)) for m in others)
        yield
    finally:
        for handle in handles:
            handle.remove()


class _SiteWatch:
    """The running Gram of one input site."""

    def __init__(self, site: str, gram: Tensor) -> None:
        self._site = site
        self._gram = gram
        self._first_input: Tensor | None = None
        self._compared: set[str] = set()

    def accumulate(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs = arguments[0]
        self._first_input = inputs
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self._gram += (rows.mT @ rows).double().cpu()

    def compare(self, matrix: WeightMatrix) -> Any:
        """A hook that checks, in the first batch, that a matrix reads what the site's first matrix reads."""

        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if matrix.module in self._compared:
                return
            self._compared.add(matrix.module)
            # NaN equals NaN here: it is reported for what it is, once the Grams are complete.
            if self._first_input is None or not torch.allclose(
                arguments[0], self._first_input, rtol=0.0, atol=0.0, equal_nan=True
            ):
                raise CalibrationError(
                    f"{matrix.module} does not read the same input as the other matrices of site {self._site}. "
                    "Map it to a role with another input site in model.roles."
                )

        return hook


def _check(gram: Tensor, matrices: Sequence[WeightMatrix]) -> None:
    if not bool(gram.diagonal().isfinite().all()):
        names = ", ".join(m.module for m in matrices)
        raise CalibrationError(
            f"The inputs of {names} hold NaN or infinite values on the calibration text, so everything behind them is "
            "lost too. Load the model in another dtype (model.dtype=float32 or bfloat16), or check its weights."
        )
