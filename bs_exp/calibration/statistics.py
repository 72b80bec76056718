"""Calibration statistics, gathered once, kept in the cache, and read one input site at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from bs_exp.cache import Cache, Entry, content_key
from bs_exp.calibration.grams import gather_grams
from bs_exp.journal import Journal
from bs_exp.protocols import Calibration
from bs_exp.types import Architecture, LoadedModel, TokenWindows, WeightGroup

KIND = "gram"


@dataclass(frozen=True, eq=False)
class CalibrationStats:
    """Grams by input site; only the group that is asked for is in memory."""

    architecture: Architecture
    sites: Mapping[str, Entry]

    def group_gram(self, group: WeightGroup) -> Float[Tensor, "d_in d_in"]:
        """Sum of the Grams of the group's layers: the Gram of their inputs stacked (Basis Sharing, section 3.1)."""
        positions = (self.architecture.by_position[group.matrix, layer] for layer in group.layers)
        first, *others = (self.sites[matrix.input_site].tensor("gram") for matrix in positions)
        return sum(others, start=first)


def statistics_key(model: LoadedModel, windows: TokenWindows, batch_size: int) -> str:
    """Hash of what the statistics depend on. The batch size changes the order of summation, hence the last bits."""
    return content_key(
        model=model.fingerprint,
        device=model.device.type,
        windows=windows.provenance["sha256"],
        batch_size=batch_size,
    )


def calibrate(
    model: LoadedModel, windows: TokenWindows, calibration: Calibration, *, cache: Cache, journal: Journal
) -> CalibrationStats:
    """The statistics of a model on its calibration windows, from the cache where it has all of them."""
    key = statistics_key(model, windows, calibration.batch_size)
    keys = {m.input_site: content_key(statistics=key, site=m.input_site) for m in model.architecture.matrices}
    entries = {site: cache.find(KIND, site_key) for site, site_key in keys.items()}
    found = {site: entry for site, entry in entries.items() if entry is not None}
    if len(found) < len(keys):
        grams = gather_grams(model, windows, batch_size=calibration.batch_size, journal=journal)
        found = {site: cache.store(KIND, keys[site], {"gram": gram}) for site, gram in grams.items()}
    return CalibrationStats(architecture=model.architecture, sites=found)
