"""Calibration statistics, gathered once, kept in the cache, and read one group at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from bs_exp.cache import Cache, Entry, content_key
from bs_exp.calibration.gradients import gather_output_grams
from bs_exp.calibration.grams import gather_grams
from bs_exp.journal import Journal
from bs_exp.protocols import Calibration
from bs_exp.types import Architecture, GroupStatistics, LoadedModel, Statistic, TokenWindows, WeightGroup


@dataclass(frozen=True, eq=False)
class CalibrationStats:
    """Grams by input site and output Grams by module; only those of the group that is asked for are in memory."""

    architecture: Architecture
    tokens: int
    grams: Mapping[str, Entry]
    output_grams: Mapping[str, Entry]

    def of(self, group: WeightGroup, device: torch.device) -> GroupStatistics:
        """The statistics of a group. Its Gram is the sum of its layers': the Gram of their inputs stacked
        (Basis Sharing, section 3.1)."""
        matrices = [self.architecture.by_position[group.matrix, layer] for layer in group.layers]
        gram, output_grams = None, None
        if self.grams:
            gram = _sum(self.grams[m.input_site].tensor("gram").to(device) for m in matrices)
        if self.output_grams:
            output_grams = {m.layer: self.output_grams[m.module].tensor("gram").to(device) for m in matrices}
        return GroupStatistics(group=group, tokens=self.tokens, gram=gram, output_grams=output_grams)


def statistics_key(model: LoadedModel, windows: TokenWindows, batch_size: int) -> str:
    """Hash of what the statistics depend on. The batch size changes the order of summation, hence the last bits."""
    return content_key(
        model=model.fingerprint,
        device=model.device.type,
        windows=windows.provenance["sha256"],
        batch_size=batch_size,
    )


def calibrate(
    model: LoadedModel,
    windows: TokenWindows,
    calibration: Calibration,
    *,
    needs: Set[Statistic],
    cache: Cache,
    journal: Journal,
) -> CalibrationStats:
    """The needed statistics of a model on its calibration windows; from the cache where it has all of them."""
    key = statistics_key(model, windows, calibration.batch_size)

    def gathered(
        statistic: Statistic, names: Set[str], gather: Callable[..., Mapping[str, Tensor]]
    ) -> dict[str, Entry]:
        if statistic not in needs:
            return {}
        keys = {name: content_key(statistics=key, name=name) for name in sorted(names)}
        found = {name: cache.find(statistic, name_key) for name, name_key in keys.items()}
        entries = {name: entry for name, entry in found.items() if entry is not None}
        if len(entries) < len(keys):
            grams = gather(model, windows, batch_size=calibration.batch_size, journal=journal)
            entries = {name: cache.store(statistic, keys[name], {"gram": gram}) for name, gram in grams.items()}
        return entries

    matrices = model.architecture.matrices
    return CalibrationStats(
        architecture=model.architecture,
        tokens=windows.ids.numel(),
        grams=gathered(Statistic.GRAM, {m.input_site for m in matrices}, gather_grams),
        output_grams=gathered(Statistic.OUTPUT_GRAM, {m.module for m in matrices}, gather_output_grams),
    )


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    total, *others = tensors
    for other in others:
        total = total + other
    return total
