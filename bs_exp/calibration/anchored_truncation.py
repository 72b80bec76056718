"""The matrices of a block truncated anew, on the inputs that the compressed model gives them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bs_exp.calibration.site_inputs import inputs_of
from bs_exp.errors import CalibrationError
from bs_exp.linalg.anchoring import anchored_factors
from bs_exp.linalg.least_squares import InputPairs, refit_coefficients, squared_loss
from bs_exp.models.architecture import weight_of
from bs_exp.models.block_stream import BlockStream
from bs_exp.models.surgery import exchange_factors, factors_of
from bs_exp.types import LoadedModel, WeightGroup


@torch.no_grad()
def truncate_anchored(
    compressed: PreTrainedModel,
    dense: LoadedModel,
    layer: int,
    groups: Sequence[WeightGroup],
    current: BlockStream,
    original: BlockStream,
    ridge: float,
    folder: Path | None,
) -> dict[str, float]:
    """New factors of a block's matrices for the outputs of the dense ones, site by site in the order of their calls.

    Both streams are in front of the block and stay there. A matrix alone gets its best factors of the same rank
    (`anchored_factors`); of a group that shares a basis the basis stays, and the layer gets new coefficients. Factors
    that do not lower the loss, as the numbers are stored, are not taken. Returns the root of the summed squared losses
    `||X P - X_f W||_F` before and after.
    """
    positions = dense.architecture.by_position
    sites = {(m := positions[group.matrix, layer]).input_site: m.module for group in groups}
    with inputs_of(compressed, sites) as order:
        current.run(layer, 0)
    before = after = 0.0
    for site in list(order):
        pairs = _pairs(compressed, dense, layer, site, sites[site], current, original)
        for group in groups:
            if positions[group.matrix, layer].input_site == site:
                one, other = _truncate(compressed, dense, layer, group, pairs, ridge, folder)
                before, after = before + one, after + other
    return {"truncation_loss_before": before**0.5, "truncation_loss_after": after**0.5}


def _pairs(
    compressed: PreTrainedModel,
    dense: LoadedModel,
    layer: int,
    site: str,
    name: str,
    current: BlockStream,
    original: BlockStream,
) -> InputPairs:
    """Moments of a site's inputs in the compressed model and of their drift; products in fp64 on a CPU."""
    found: InputPairs | None = None
    with current.resident(layer), original.resident(layer):
        for batch in range(len(current)):
            with inputs_of(dense.module, {site: name}) as wanted:
                original.run(layer, batch)
            with inputs_of(compressed, {site: name}) as seen:
                current.run(layer, batch)
            if site not in seen or site not in wanted or seen[site].shape != wanted[site].shape:
                raise CalibrationError(
                    f"{name} does not read the same tokens in the dense and in the compressed model, so it cannot be "
                    "truncated towards the dense outputs. Use update.start=present."
                )
            pairs = InputPairs.of(_exact(seen[site]), _exact(wanted[site]))
            found = pairs if found is None else found + pairs
    assert found is not None
    return found


def _exact(rows: Tensor) -> Tensor:
    return rows.double() if rows.device.type == "cpu" else rows


def _truncate(
    compressed: PreTrainedModel,
    dense: LoadedModel,
    layer: int,
    group: WeightGroup,
    pairs: InputPairs,
    ridge: float,
    folder: Path | None,
) -> tuple[float, float]:
    """Exchanges the factors of one matrix; the squared losses before and after."""
    weight = weight_of(dense.module, dense.architecture.by_position[group.matrix, layer]).to(dense.device).double()
    stored = factors_of(compressed, dense.architecture, group).on(dense.device)
    layout = stored.layout
    present = layout.restore(stored)
    own = present.corrections.get(layer)
    fixed = None if own is None else own[0] @ own[1]

    def loss(product: Tensor) -> float:
        return squared_loss(product if fixed is None else product + fixed, weight, pairs, 1.0)

    if group.size == 1 and fixed is None:
        candidate = layout.arrange(anchored_factors(group, weight, pairs, stored.rank, ridge=ridge))
    else:
        new = refit_coefficients(
            present.basis, present.coefficients[layer], weight, pairs, beta=1.0, ridge=ridge, fixed=fixed
        )
        candidate = layout.with_coefficients(stored, {layer: new})
    candidate = candidate.in_dtype(stored.basis.dtype)
    rounded = layout.restore(candidate)
    before = loss(present.basis @ present.coefficients[layer])
    after = loss(rounded.basis @ rounded.coefficients[layer])
    if not after < before:  # not so if it overflows the dtype
        return before, before
    exchange_factors(compressed, dense.architecture, candidate, folder)
    return before, after
