"""The weight, statistics, metric and spectrum of any group of matrices, each computed when it is first used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.cache import Entry, content_key
from bs_exp.calibration.group_statistics import CalibrationStats, calibrate, gram_dtype, statistics_key
from bs_exp.contracts import check_metric, untouched_statistics
from bs_exp.errors import DecompositionError
from bs_exp.identity import identity
from bs_exp.linalg.decomposition import spectrum_of
from bs_exp.models.architecture import weight_of
from bs_exp.models.mapped import release
from bs_exp.protocols import Importance, Whitening
from bs_exp.records.stages import Stage
from bs_exp.types import (
    CalibrationData,
    GroupStatistics,
    LoadedModel,
    LossUnit,
    Metric,
    Spectrum,
    Statistic,
    WeightGroup,
)
from bs_exp.workspace import Workspace

T = TypeVar("T")

SPECTRUM = "spectrum"
_UNITS = tuple(LossUnit)
LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


@dataclass(eq=False, kw_only=True)
class GroupMeasures:
    """Groups of the weights of `dense`, in the metric that the statistics of `current` on `data` give.

    Statistics are gathered when something first asks for them, all that are in `needs` at once.
    """

    dense: LoadedModel
    current: LoadedModel
    data: CalibrationData
    needs: Set[Statistic]
    whitening: Whitening
    importance: Importance
    workspace: Workspace

    def gather(self) -> None:
        """Gathers the statistics now instead of at their first use."""
        _ = self._statistics

    def weight(self, group: WeightGroup, device: torch.device | None = None) -> Float[Tensor, "d_in columns"]:
        """The concatenated dense weights of a group, in fp64, on the model's device if on no other."""
        matrices = [self.dense.architecture.by_position[group.matrix, layer] for layer in group.layers]
        weights = [weight_of(self.dense.module, m).detach() for m in matrices]
        found = torch.cat([weight.to(device or self.dense.device).double() for weight in weights], dim=1)
        release(weights)
        return found

    def statistics(self, group: WeightGroup, device: torch.device | None = None) -> GroupStatistics:
        """The gathered statistics of a group, on the model's device if on no other; without calibration, none."""
        if self._statistics is None:
            return GroupStatistics(group=group, tokens=0)
        return self._statistics.of(group, device or self.dense.device)

    def metric(self, group: WeightGroup, device: torch.device | None = None) -> Metric:
        """The metric that whitening and importance make of a group's statistics."""
        return metric_of(self.statistics(group, device), self.whitening, self.importance)

    def made(self, make: Callable[[WeightGroup, Tensor, Metric], T], group: WeightGroup) -> T:
        """What `make` makes of a group's weight and metric on the model's device, and on the CPU if memory lacks there.

        Raises DecompositionError that names the modules, for a weight or a metric of which it cannot be made.
        """
        try:
            return self._made(make, group, None)
        except torch.OutOfMemoryError:
            if self.dense.device.type == "cpu":
                raise
        # Here and not above, where the error still holds what there was no room for.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.workspace.progress.note(
            f"{group.name} is decomposed on the CPU: the memory of {self.dense.device} does not suffice"
        )
        return self._made(make, group, torch.device("cpu"))

    def _made(
        self, make: Callable[[WeightGroup, Tensor, Metric], T], group: WeightGroup, device: torch.device | None
    ) -> T:
        try:
            return make(group, self.weight(group, device), self.metric(group, device))
        except (DecompositionError, LinAlgError) as error:
            raise self.failure(group, error) from error

    def spectrum(self, group: WeightGroup) -> Spectrum:
        """The spectrum of a group from eigenvalues alone, from the cache where it has it."""
        key = self.key(group)
        entry = self.workspace.cache.find(SPECTRUM, key)
        if entry is None:
            found = self.made(spectrum_of, group)
            entry = self.workspace.cache.store(SPECTRUM, key, spectrum_tensors(found))
        return read_spectrum(group, entry)

    def track(self, groups: Sequence[WeightGroup], label: str) -> Iterator[WeightGroup]:
        """The groups one by one, under a progress bar."""
        return self.workspace.progress.track(groups, label=label, total=len(groups))

    def key(self, group: WeightGroup) -> str:
        """Hash of the weights, the statistics, the strategies that make the metric from them, and of the rounding."""
        rounding = {} if self.factor_dtype is torch.float64 else {"dtype": str(self.factor_dtype)}
        return content_key(
            **rounding,
            model=self.dense.fingerprint,
            device=self.dense.device.type,
            statistics=self._statistics_key,
            whitening=identity(self.whitening),
            importance=identity(self.importance) if self._statistics_key else None,
            group=asdict(group),
        )

    @property
    def factor_dtype(self) -> torch.dtype:
        """That in which the cache stores the factors of this model's groups."""
        numbers = sum(min(m.d_in, m.d_out) * (m.d_in + m.d_out) for m in self.dense.architecture.matrices)
        return self.workspace.cache.stored_dtype(numbers)

    def failure(self, group: WeightGroup, error: Exception) -> DecompositionError:
        """The error with the names of the group's modules."""
        matrices = [self.dense.architecture.by_position[group.matrix, layer] for layer in group.layers]
        return DecompositionError(f"{group.name} ({', '.join(m.module for m in matrices)}): {error}")

    @cached_property
    def _statistics_key(self) -> str | None:
        # What a sharing strategy asks for besides does not change a decomposition.
        if not self.needs or not self.whitening.needs | self.importance.needs:
            return None
        key = statistics_key(self.current, self.data)
        dtype = gram_dtype(self.workspace.cache, self.current.architecture)
        return key if dtype is torch.float64 else content_key(statistics=key, dtype=str(dtype))

    @cached_property
    def _statistics(self) -> CalibrationStats | None:
        if not self.needs:
            return None
        with self.workspace.progress.stage(Stage.CALIBRATE):
            return calibrate(self.current, self.data, needs=self.needs, workspace=self.workspace)


def metric_of(given: GroupStatistics, whitening: Whitening, importance: Importance) -> Metric:
    """The metric that whitening and importance make of the statistics of a group."""
    with untouched_statistics(given, importance, whitening):
        weighted = importance.reweight(given)
        metric = whitening.metric(weighted)
    check_metric(metric, given.group, whitening)
    if metric.unit is LossUnit.OUTPUT_NORM and not _same_gram(given, weighted):
        # The norm on re-weighted inputs is no longer one of the outputs.
        return replace(metric, unit=LossUnit.METRIC_NORM)
    return metric


def _same_gram(one: GroupStatistics, other: GroupStatistics) -> bool:
    if one.gram is None or other.gram is None:
        return one.gram is other.gram
    return one.gram is other.gram or torch.equal(one.gram, other.gram)


def spectrum_tensors(spectrum: Spectrum) -> dict[str, Tensor]:
    """A spectrum as tensors for the cache."""
    return {
        "singular_values": spectrum.singular_values.cpu(),
        "energies": spectrum.energies.cpu(),
        "ridge": torch.tensor(spectrum.ridge, dtype=torch.float64),
        "unit": torch.tensor(_UNITS.index(spectrum.unit)),
        "damping": torch.tensor(spectrum.damping, dtype=torch.float64),
    }


def read_spectrum(group: WeightGroup, entry: Entry) -> Spectrum:
    """The inverse of `spectrum_tensors`."""
    return Spectrum(
        group=group,
        singular_values=entry.tensor("singular_values"),
        energies=entry.tensor("energies"),
        ridge=float(entry.tensor("ridge")),
        unit=_UNITS[int(entry.tensor("unit"))],
        damping=float(entry.tensor("damping")),
    )
