"""The decompositions of all groups of a model: made once, kept in the cache, read as far as a plan asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch

from bs_exp.cache import Cache, Entry, content_key
from bs_exp.calibration.statistics import CalibrationStats
from bs_exp.decomposition import decompose, split_by_layer
from bs_exp.errors import DecompositionError
from bs_exp.journal import Journal
from bs_exp.models.architecture import weight_of
from bs_exp.protocols import Importance, Whitening
from bs_exp.types import (
    Decomposition,
    GroupStatistics,
    LoadedModel,
    LossUnit,
    RankPlan,
    SharedFactors,
    Spectrum,
    WeightGroup,
)

KIND = "decomposition"
LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class Decompositions:
    """One cache entry per group. Spectra are small and read at once, factors group by group and up to their rank."""

    entries: Mapping[WeightGroup, Entry]

    @property
    def spectra(self) -> tuple[Spectrum, ...]:
        """All spectra, in the order of the groups."""
        return tuple(
            Spectrum(
                group=group,
                singular_values=entry.tensor("singular_values"),
                energies=entry.tensor("energies"),
                ridge=float(entry.tensor("ridge")),
                unit=LossUnit.NATS if bool(entry.tensor("nats")) else LossUnit.OUTPUT_NORM,
                damping=float(entry.tensor("damping")),
            )
            for group, entry in self.entries.items()
        )

    def truncated(self, plan: RankPlan) -> Iterator[SharedFactors]:
        """The factors of a plan, one group at a time; groups that stay dense are left out."""
        for planned in plan.groups:
            if planned.rank is not None:
                entry = self.entries[planned.group]
                yield split_by_layer(
                    planned.group, entry.rows("basis_t", planned.rank), entry.rows("coefficients", planned.rank)
                )


def decomposition_keys(
    model: LoadedModel,
    groups: Iterable[WeightGroup],
    *,
    whitening: Whitening,
    importance: Importance,
    statistics: str | None,
) -> dict[WeightGroup, str]:
    """The cache key of each group: the weights, the statistics, and the strategies that make the metric from them."""
    return {
        group: content_key(
            model=model.fingerprint,
            device=model.device.type,
            statistics=statistics,
            whitening=repr(whitening),
            importance=repr(importance) if statistics else None,
            group=asdict(group),
        )
        for group in groups
    }


def decompose_missing(
    model: LoadedModel,
    missing: Mapping[WeightGroup, str],
    *,
    whitening: Whitening,
    importance: Importance,
    statistics: CalibrationStats | None,
    cache: Cache,
    journal: Journal,
) -> dict[WeightGroup, Entry]:
    """Decomposes groups, one at a time, and stores each under its key.

    Raises DecompositionError, with the group's name, if its weights or its Gram cannot be factorised.
    """
    made = {}
    for group, key in journal.track(missing.items(), label="decomposing", total=len(missing)):
        matrices = [model.architecture.by_position[group.matrix, layer] for layer in group.layers]
        weight = torch.cat([weight_of(model.module, m).detach().double() for m in matrices], dim=1)
        values = GroupStatistics(group=group, tokens=0)
        if statistics is not None:
            values = statistics.of(group, weight.device)
        try:
            decomposition = decompose(group, weight, whitening.metric(importance.reweight(values)))
        except (DecompositionError, LinAlgError) as error:
            raise DecompositionError(f"{group.name} ({', '.join(m.module for m in matrices)}): {error}") from error
        made[group] = cache.store(KIND, key, _tensors(decomposition))
    return made


def _tensors(decomposition: Decomposition) -> dict[str, torch.Tensor]:
    spectrum = decomposition.spectrum
    return {
        "basis_t": decomposition.basis_t.cpu(),
        "coefficients": decomposition.coefficients.cpu(),
        "singular_values": spectrum.singular_values.cpu(),
        "energies": spectrum.energies.cpu(),
        "ridge": torch.tensor(spectrum.ridge, dtype=torch.float64),
        "nats": torch.tensor(spectrum.unit is LossUnit.NATS),
        "damping": torch.tensor(spectrum.damping, dtype=torch.float64),
    }
