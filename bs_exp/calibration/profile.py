"""What calibration finds of whole blocks: how sensitive the loss is to their weights, and how their outputs spread."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor

from bs_exp import processes
from bs_exp.cache import content_key
from bs_exp.calibration.gather import gather
from bs_exp.calibration.group_statistics import statistics_key
from bs_exp.types import CalibrationData, LayerProfile, LoadedModel, Statistic
from bs_exp.workspace import Workspace


def profile_blocks(
    model: LoadedModel,
    data: CalibrationData,
    *,
    needs: Set[Statistic],
    workspace: Workspace,
) -> LayerProfile:
    """The needed statistics of a dense model's blocks; from the cache where it has them."""
    # The targeted matrices are part of the key: roles can leave some of them out.
    matrices = [m.module for m in model.architecture.matrices]
    key = content_key(statistics=statistics_key(model, data), matrices=matrices)

    def values(statistic: Statistic) -> Tensor | None:
        """Those of all blocks, by layer."""
        if statistic not in needs:
            return None
        entry = workspace.cache.find(statistic, key)
        if processes.from_first(lambda: entry is None):
            found = gather(model, data, {statistic}, progress=workspace.progress, folder=workspace.cache.folder)
            ordered = sorted(found, key=lambda gathered: int(gathered[1]))
            stacked = torch.stack([value for _, _, tensors in ordered for value in tensors.values()])
            entry = workspace.cache.store(statistic, key, {"values": stacked})
        assert entry is not None
        return entry.tensor("values")

    outputs = values(Statistic.BLOCK_OUTPUTS)
    return LayerProfile(
        sensitivity=values(Statistic.SENSITIVITY),
        output_singular_values=None if outputs is None else dict(enumerate(outputs)),
    )
