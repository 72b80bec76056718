"""Statistics gathered on the spot, past the cache."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bs_exp.calibration.gather import gather
from bs_exp.progress import Progress
from bs_exp.types import CalibrationData, LoadedModel, Statistic

Found = Mapping[Statistic, Mapping[str, Mapping[str, Tensor]]]


def gathered(model: LoadedModel, data: CalibrationData, *statistics: Statistic) -> Found:
    """Tensors by statistic, subject and name."""
    found: dict[Statistic, dict[str, dict[str, Tensor]]] = {statistic: {} for statistic in statistics}
    for statistic, name, tensors in gather(model, data, set(statistics), progress=Progress(quiet=True)):
        found[statistic][name] = tensors
    return found


def grams_of(model: LoadedModel, data: CalibrationData) -> Mapping[str, Tensor]:
    """`X^T X` by input site."""
    return {site: tensors["gram"] for site, tensors in gathered(model, data, Statistic.GRAM)[Statistic.GRAM].items()}
