"""One small interface per strategy family. Constructor = settings, method = data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bs_exp.types import (
    Architecture,
    CalibrationData,
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
from bs_exp.validation import check_at_least, check_choice
from bs_exp.workspace import Workspace

Item = TypeVar("Item")

OBJECTIVES = ("cosine", "perplexity", "kl")


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

    def track(self, groups: Sequence[WeightGroup], label: str) -> Iterator[WeightGroup]:
        """The groups one by one, under a progress bar."""


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
    `needs` are statistics beyond those that the metric is made of. One that works `in_nats` adds up losses of different
    matrix types, so the whitening must give them one unit.
    """

    measured: ClassVar[bool]
    in_nats: ClassVar[bool]

    @property
    def needs(self) -> frozenset[Statistic]: ...

    def view(self, dense: LoadedModel) -> LoadedModel:
        """The model whose matrices are put into groups: `dense` itself, or a twin that stores them in another way."""

    def check(self, architecture: Architecture) -> None:
        """ConfigError if the settings do not fit the model; asked before any work."""

    def groups(self, problem: SharingProblem) -> tuple[WeightGroup, ...]:
        """Every targeted matrix in exactly one group."""


class Analysis(Protocol):
    """What a run can tell besides its compressed model."""

    def check(self, architecture: Architecture) -> None:
        """ConfigError if the settings do not fit the model; asked before any work."""

    def save(self, problem: SharingProblem, folder: Path) -> tuple[Path, ...]:
        """The files that it wrote into the run's folder. The problem has measures."""


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


@dataclass(frozen=True, kw_only=True)
class PlanObjective:
    """What a plan is measured by, on the outputs of the model that it makes; lower is better.

    `cosine`: 1 - cosine similarity to the dense model's outputs, averaged over the predicted tokens (DipSVD's paper);
    outputs are logits, or the last hidden states of a model without a head. `perplexity`: the mean loss of the
    predicted tokens, in nats, whose exponential is the perplexity (DipSVD's code, ASVD). `kl`: KL divergence from the
    dense model's predictions, in nats per predicted token. Measured on `num_windows` of the windows, spread evenly;
    None takes all.
    """

    objective: str
    num_windows: int | None

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        check_at_least(1, num_windows=self.num_windows)


class Score(Protocol):
    """Measures plans; lower is better, and infinity where the outputs are not finite."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What scores depend on besides the plan, as plain data: the same only for the same scores."""

    def __call__(self, plan: RankPlan) -> float:
        """The score of a plan."""

    def running(self, plan: RankPlan) -> Iterator[float]:
        """The score over the batches so far, after each of them; the last one is the score."""

    def track(
        self, iterable: Iterable[Item], *, label: str | Callable[[], str], total: int | None = None
    ) -> Iterator[Item]:
        """The items, under a progress bar."""


@dataclass(frozen=True, eq=False)
class AllocationProblem:
    """All that an allocator may see: the groups' spectra, what ranks cost, and the share of parameters to keep.

    `profile` holds what calibration found of the blocks, as far as the allocator `needs` it; `score` measures plans for
    those that are decided by measurement.
    """

    spectra: tuple[Spectrum, ...]
    retain_ratio: float
    layout: Layout
    profile: LayerProfile | None = None
    score: Score | None = None


class Allocation(Protocol):
    """Who gets the ranks."""

    @property
    def needs(self) -> frozenset[Statistic]: ...

    def check(self, groups: tuple[WeightGroup, ...], retain_ratio: float, layout: Layout) -> None:
        """ConfigError if no plan is possible for these groups and this budget; asked before any work."""

    def allocate(self, problem: AllocationProblem) -> RankPlan:
        """A plan within the budget."""


@runtime_checkable
class MeasuredAllocation(Allocation, Protocol):
    """An allocation that measures plans before it decides, and so needs a `score` in its problem."""

    @property
    def measured_by(self) -> PlanObjective: ...

    def check_search(self, identity: Mapping[str, Any]) -> None:
        """ConfigError if a search with this `Score.identity` cannot start or go on; asked before any work."""


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


@dataclass(frozen=True, eq=False)
class Contest:
    """How candidates are compared: made from `training`, measured by `objective` on `held_out`, windows of which no
    candidate knows.

    `single_round`: after one round of compression, whatever their schedule. `recalibrate`: the winner is then made from
    all windows.
    """

    training: TokenWindows
    held_out: TokenWindows
    objective: PlanObjective
    single_round: bool
    recalibrate: bool


class Selection(Protocol):
    """Which of several recipes is used."""

    @property
    def candidates(self) -> Mapping[str, Mapping[str, Any]]:
        """By name, the strategies that a candidate puts in place of the recipe's; without any, nothing is chosen."""

    def contest(self, windows: TokenWindows) -> Contest:
        """How the candidates are compared on the calibration windows."""


class Update(Protocol):
    """What happens to the factors after truncation.

    `reads_windows` says whether the calibration windows are read; where no strategy does, there are none.
    """

    @property
    def reads_windows(self) -> bool: ...

    def check(self, dense: LoadedModel, data: CalibrationData) -> None:
        """An error for settings that do not fit model or text; asked before any work."""

    def apply(
        self,
        compressed: PreTrainedModel,
        dense: LoadedModel,
        plan: RankPlan,
        data: CalibrationData,
        workspace: Workspace,
    ) -> Mapping[str, Any]:
        """Changes the factors of the compressed model in place; plain data on what was done, empty for nothing.

        `plan` says which groups are factorised, and at which retained share.
        """


class Evaluator(Protocol):
    """One way to judge a model; dense and compressed models go through the same call."""

    def check(self, model: LoadedModel) -> None:
        """An error for settings that cannot work with this model; cheap, and asked before any work."""

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
