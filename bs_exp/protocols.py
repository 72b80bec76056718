"""One small interface per strategy family. Constructor = settings, method = data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bs_exp.cache import Cache
from bs_exp.journal import Journal
from bs_exp.types import (
    Architecture,
    GroupStatistics,
    LayerProfile,
    LoadedModel,
    Metric,
    RankPlan,
    SharedFactors,
    Spectrum,
    Statistic,
    StoredFactors,
    TokenWindows,
    WeightGroup,
)


class ModelSource(Protocol):
    """Where the dense model comes from."""

    def load(self) -> LoadedModel:
        """The model in evaluation mode, with its tokenizer and discovered matrices."""


class Corpus(Protocol):
    """A source of text."""

    def read(self) -> tuple[str, Mapping[str, object]]:
        """The whole text, and its provenance (files, data set, revision, fingerprint)."""


class Measures(Protocol):
    """What can be known of any group of matrices, on the model's device and in fp64."""

    def weight(self, group: WeightGroup) -> Float[Tensor, "d_in columns"]:
        """The concatenated dense weights of a group."""

    def statistics(self, group: WeightGroup) -> GroupStatistics:
        """What calibration gathered for a group."""

    def metric(self, group: WeightGroup) -> Metric:
        """The metric that whitening and importance make of its statistics."""

    def spectrum(self, group: WeightGroup) -> Spectrum:
        """Its singular values in that metric, from eigenvalues alone."""


@dataclass(frozen=True, eq=False)
class SharingProblem:
    """All that a sharing strategy may see: the matrices, and what the run will do with the groups.

    `measures` is there for strategies that are `measured`: the model's weights and statistics, group by group.
    """

    architecture: Architecture
    retain_ratio: float
    layout: Layout
    measures: Measures | None = None


class Sharing(Protocol):
    """Who shares a basis with whom.

    A strategy that is `measured` looks at weights and statistics, so its groups are known only after calibration.
    `needs` are statistics beyond those that the metric is made of.
    """

    measured: ClassVar[bool]

    @property
    def needs(self) -> frozenset[Statistic]: ...

    def check(self, architecture: Architecture) -> None:
        """ConfigError if the settings do not fit the model; asked before any work."""

    def groups(self, problem: SharingProblem) -> tuple[WeightGroup, ...]:
        """Every targeted matrix in exactly one group."""


class Importance(Protocol):
    """Local importance: which channels count more in the metric.

    A strategy that re-weights needs a Gram, and a whitening that reads it. Predicted losses are then those of the
    re-weighted metric, no longer errors of the outputs.
    """

    @property
    def needs(self) -> frozenset[Statistic]: ...

    def reweight(self, statistics: GroupStatistics) -> GroupStatistics:
        """The statistics with important channels amplified in the Gram; the given ones are not changed."""


class Whitening(Protocol):
    """In which metric the error of a group is measured.

    Importance acts on the Gram: only a whitening that lists it in `needs` can be re-weighted.
    """

    needs: ClassVar[frozenset[Statistic]]

    def metric(self, statistics: GroupStatistics) -> Metric:
        """The metric of a group from its statistics, whose Gram the importance strategy has already re-weighted."""


class Layout(Protocol):
    """How the factors of a group are stored."""

    name: ClassVar[str]

    def parameters(self, group: WeightGroup, rank: int) -> int:
        """Stored parameters of a group at a rank; grows with the rank."""

    def arrange(self, factors: SharedFactors) -> StoredFactors:
        """The factors as they are stored: another form of the same product."""


@dataclass(frozen=True, eq=False)
class AllocationProblem:
    """All that an allocator may see: the groups' spectra, what ranks cost, and the share of parameters to keep.

    `profile` holds what calibration found of the blocks, as far as the allocator `needs` it.
    """

    spectra: tuple[Spectrum, ...]
    retain_ratio: float
    layout: Layout
    profile: LayerProfile | None = None


class Allocation(Protocol):
    """Who gets the ranks."""

    needs: ClassVar[frozenset[Statistic]]

    def check(self, groups: tuple[WeightGroup, ...], retain_ratio: float, layout: Layout) -> None:
        """ConfigError if no plan is possible for these groups and this budget; asked before any work."""

    def allocate(self, problem: AllocationProblem) -> RankPlan:
        """A plan within the budget."""


class Calibration(Protocol):
    """The token sequences on which statistics are gathered."""

    @property
    def batch_size(self) -> int: ...

    def windows(self, tokenizer: PreTrainedTokenizerBase) -> TokenWindows:
        """Windows of equal length, the same for the same settings and text."""


class Schedule(Protocol):
    """In how many rounds the model is brought down to the budget."""

    def next_ratio(self, current: float, target: float, loss_at: Callable[[float], float]) -> float:
        """The retained share to compress to next: below `current`, and `target` in the last round.

        `loss_at` predicts the loss at a retained share from the statistics of the model compressed so far.
        """


class Update(Protocol):
    """What happens to the factors after truncation."""

    def apply(
        self, compressed: PreTrainedModel, dense: LoadedModel, calibration: Calibration, cache: Cache, journal: Journal
    ) -> Mapping[str, Any]:
        """Changes the factors of the compressed model in place; plain data on what was done, empty for nothing."""


class Evaluator(Protocol):
    """One way to judge a model; dense and compressed models go through the same call."""

    def evaluate(self, model: LoadedModel) -> Mapping[str, float | str]:
        """Metrics by name, such as `ppl/wikitext2`, `acc/piqa`, `throughput/decode_tok_s`; texts say how they came."""


class TrackedRun(Protocol):
    """A run under way in a tracker."""

    def log(self, metrics: Mapping[str, object]) -> None:
        """Metrics by name."""

    def finish(self, record: Mapping[str, object]) -> None:
        """Closes the run with its final record, whatever its status."""


class Tracker(Protocol):
    """Where a run is logged besides its record. TrackingError if that cannot be; the run then goes on without it."""

    def start(self, record: Mapping[str, object], folder: Path) -> TrackedRun:
        """Opens the run; files of the tracker go under `folder`."""
