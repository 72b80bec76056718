"""One small interface per family of strategies: the constructor takes settings, the methods take data.

What every implementation keeps:
- Its constructor takes all settings and refuses those that make no sense with a ConfigError; afterwards they do not
  change. A frozen dataclass is the easy way. Keys of the cache hold the fields (or attributes), and the source.
- Methods depend on settings and arguments alone: the same arguments give the same bits. What is random has a seed.
- Arguments are read, never changed, but for the factors that an update is given.
- Tensors of mathematics are fp64, on the device of those that were given.
- What cannot work with a model is refused by `check`, in seconds, before the long work.

`bs_exp.contracts` checks at run time what is cheap to check (marked "checked" below), and names the class that breaks
it; the suites of `bs_exp.testing` check the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bs_exp.types import (
    Architecture,
    CalibrationData,
    Corrections,
    GroupStatistics,
    LayerProfile,
    LoadedModel,
    Metric,
    RankPlan,
    SharedFactors,
    Spectrum,
    Statistic,
    TokenWindows,
    WeightGroup,
)
from bs_exp.validation import check_at_least, check_choice
from bs_exp.workspace import Workspace

Item = TypeVar("Item")

OBJECTIVES = ("cosine", "perplexity", "kl")


class ModelSource(Protocol):
    """A source of the dense model."""

    def load(self) -> LoadedModel:
        """The model in evaluation mode, with its tokenizer and discovered matrices; ModelError if it cannot be loaded.

        `fingerprint` is a hash of the weights (`bs_exp.models.fingerprint`): everything that is cached hangs on it.
        """


class Corpus(Protocol):
    """A source of text."""

    def read(self) -> tuple[str, Mapping[str, object]]:
        """The whole text, and its provenance (files, data set, revision, fingerprint) as plain data.

        The same text every time, with its own line ends; DataError if it is missing or empty.
        `bs_exp.corpora.provenance.describe` makes the provenance.
        """


class Measures(Protocol):
    """Weights, statistics and spectra of any group of matrices, in fp64 on the model's device."""

    def weight(self, group: WeightGroup) -> Float[Tensor, "d_in columns"]:
        """The concatenated dense weights of a group."""

    def statistics(self, group: WeightGroup) -> GroupStatistics:
        """The calibration statistics of a group."""

    def metric(self, group: WeightGroup) -> Metric:
        """The metric that whitening and importance make from a group's statistics."""

    def spectrum(self, group: WeightGroup) -> Spectrum:
        """The spectrum of a group in its metric, from eigenvalues alone (see `spectrum_of`)."""

    def track(self, groups: Sequence[WeightGroup], label: str) -> Iterator[WeightGroup]:
        """The groups one by one, under a progress bar with this label."""


@dataclass(frozen=True, eq=False)
class SharingProblem:
    """The input of a sharing strategy: the matrices, the share of parameters to keep, and the layout of factors.

    `measures` gives weights and statistics to strategies that are `measured`; it is None for the others.
    """

    architecture: Architecture
    retain_ratio: float
    layout: Layout
    measures: Measures | None = None


class Sharing(Protocol):
    """Divides the matrices into groups that share a basis.

    A strategy that is `measured` reads weights and statistics, so its groups are known only after calibration.
    `needs` are statistics beyond those that the metric is made from. A strategy that is `in_nats` adds losses of
    different matrix types, so it needs a whitening whose losses are in nats, and
    refuses measures in another unit with a ConfigError.
    """

    measured: ClassVar[bool]
    in_nats: ClassVar[bool]

    @property
    def needs(self) -> frozenset[Statistic]: ...

    def check(self, architecture: Architecture) -> None:
        """ConfigError if the settings do not fit the model; called before any work."""

    def groups(self, problem: SharingProblem) -> tuple[WeightGroup, ...]:
        """Every targeted matrix in exactly one group (checked): a matrix that shares with none is a group of one layer.

        Layers of a group rise, all of one matrix type and of its shape (checked). The problem has `measures` if the
        strategy is `measured`, and then only the statistics that are in `needs` may be asked for.
        """


@runtime_checkable
class SplitsMatrices(Protocol):
    """A sharing strategy whose groups are made of parts of the model's matrices."""

    def view(self, dense: LoadedModel) -> LoadedModel:
        """A twin of the dense model in which these parts are matrices; the other stages see no other model."""


class Analysis(Protocol):
    """Writes results besides the compressed model into the run's folder, from the calibration statistics."""

    def check(self, architecture: Architecture) -> None:
        """ConfigError if the settings do not fit the model; called before any work."""

    def save(self, problem: SharingProblem, folder: Path) -> tuple[Path, ...]:
        """Writes into `folder`, and nowhere else, and returns the paths of the files. The problem has measures."""


class Importance(Protocol):
    """Local importance: which input channels count more in the metric.

    A strategy that re-weights needs a Gram, and a whitening that reads it. Predicted losses are then those of the
    re-weighted metric, no longer errors of the outputs.
    """

    @property
    def needs(self) -> frozenset[Statistic]: ...

    def reweight(self, statistics: GroupStatistics) -> GroupStatistics:
        """The statistics with important channels amplified in the Gram; the given ones are not changed (checked).

        The Gram stays symmetric and positive semi-definite, `[d_in, d_in]` in fp64; scaled inputs scale it. The very
        object that was given means: nothing re-weighted. ValueError without a statistic that is in `needs`.
        """


class Whitening(Protocol):
    """The metric in which the error of a group is measured.

    Importance acts on the Gram: only a whitening that lists it in `needs` can be re-weighted.
    """

    @property
    def needs(self) -> frozenset[Statistic]: ...

    def metric(self, statistics: GroupStatistics) -> Metric:
        """The metric of a group from its statistics, whose Gram the importance strategy has already re-weighted.

        `whitener` is `[d_in, d_in]`, `right` `[d_out, d_out]` by layer: finite and invertible (checked), any root of
        what they stand for (`Metric`). `ridge` is what was added to the diagonal, in units of the Gram, so that
        predicted losses can leave it out. The statistics are not changed (checked). ValueError without one that is in
        `needs`.
        """


@runtime_checkable
class AdaptsToModel(Whitening, Protocol):
    """A whitening that leaves something to the model."""

    def for_model(self, dense: LoadedModel) -> Whitening:
        """The whitening with all of it decided; the same if it is. ConfigError if it does not fit the model."""


@dataclass(frozen=True, eq=False)
class StoredFactors:
    """The factors of a group in the form in which a layout stores them; made by its `arrange`.

    A factor is a matrix `[in, out]`: `basis` has one column per component, the coefficients of a layer one row per
    component; what stands in them is up to the layout. `kept` holds further tensors that all layers of the group have
    alike, by the names of the buffers that hold them in the layers. Corrections are stored as they are.
    """

    layout: Layout
    group: WeightGroup
    basis: Float[Tensor, "inputs rank"]
    coefficients: Mapping[int, Float[Tensor, "rank outputs"]]
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    corrections: Corrections = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    def on(self, device: torch.device) -> StoredFactors:
        """The same factors on a device; the same tensors if they are there."""
        return replace(
            self._mapped(lambda tensor: tensor.to(device)), kept={n: k.to(device) for n, k in self.kept.items()}
        )

    def in_dtype(self, dtype: torch.dtype) -> StoredFactors:
        """The factors rounded to a dtype; what is kept beside them stays as it is."""
        return self._mapped(lambda tensor: tensor.to(dtype))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> StoredFactors:
        return replace(
            self,
            basis=change(self.basis),
            coefficients={layer: change(c) for layer, c in self.coefficients.items()},
            corrections={layer: (change(down), change(up)) for layer, (down, up) in self.corrections.items()},
        )


class Layout(Protocol):
    """How the factors of a group are stored: the only one who knows, besides the class of its layers.

    That class is found by `name` in the table `LAYOUTS` of `models/modeling_basis_sharing.py`. It states the shapes of
    what is stored (`FactorisedLinear.shapes`) and computes with it. A folder is loaded by that table too, and a copy of
    the file lies in every saved folder: so a layout that adds its row in another package can be compressed with and
    saved, but loads only in a process that has added the row; elsewhere the folder is refused by the layout's name.
    """

    name: ClassVar[str]

    def parameters(self, group: WeightGroup, rank: int) -> int:
        """Stored parameters of a group at a rank from 1 to `full_rank`, corrections among them.

        A whole number that grows strictly with the rank, and that of the tensors which `arrange` gives.
        """

    def arrange(self, factors: SharedFactors) -> StoredFactors:
        """The factors as they are stored: another form of the same products, up to rounding, of the same rank."""

    def restore(self, stored: StoredFactors) -> SharedFactors:
        """Factors `[d_in, rank]` and `[rank, d_out]` of the same product, and the corrections, in fp64."""

    def with_coefficients(
        self, stored: StoredFactors, coefficients: Mapping[int, Float[Tensor, "rank d_out"]]
    ) -> StoredFactors:
        """The factors with new coefficients for some layers, which belong to the basis that `restore` gives.

        What need not change keeps its bits: above all the basis and the other layers of a shared group.
        """


@runtime_checkable
class ArrangesAlike(Layout, Protocol):
    """A layout that finds a place for factors sooner where it has found one for others that are close to them."""

    def arrange_like(self, factors: SharedFactors, stored: StoredFactors) -> StoredFactors:
        """As `arrange`, with what `stored` keeps beside its factors if that serves, too; both are of the same rank."""


@dataclass(frozen=True, kw_only=True)
class PlanObjective:
    """How a plan is measured, on the outputs of the model compressed by it; lower is better.

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
        """Plain data that identifies all that scores depend on besides the plan: equal only if scores are."""

    def __call__(self, plan: RankPlan) -> float:
        """The score of a plan."""

    def running(self, plan: RankPlan) -> Iterator[float]:
        """The mean score over the batches so far, after each batch; the last value is the score."""

    def track(
        self, iterable: Iterable[Item], *, label: str | Callable[[], str], total: int | None = None
    ) -> Iterator[Item]:
        """The items, under a progress bar."""


@dataclass(frozen=True, eq=False)
class AllocationProblem:
    """The input of an allocator: the groups' spectra, the share of parameters to keep, and the layout of factors.

    `profile` holds the statistics of blocks that the allocator `needs`; `score` measures plans, and is given only to a
    `MeasuredAllocation`.
    """

    spectra: tuple[Spectrum, ...]
    retain_ratio: float
    layout: Layout
    profile: LayerProfile | None = None
    score: Score | None = None


class Allocation(Protocol):
    """Chooses the rank of every group."""

    @property
    def needs(self) -> frozenset[Statistic]: ...

    def check(self, groups: tuple[WeightGroup, ...], retain_ratio: float, layout: Layout) -> None:
        """ConfigError if no plan is possible for these groups and this budget; called before any work."""

    def allocate(self, problem: AllocationProblem) -> RankPlan:
        """A plan within the budget (checked): `parameters <= retain_ratio * dense_parameters`.

        It holds the groups of the spectra in their order, each with a rank from 1 to `full_rank` or None (dense), what
        that takes in the layout, and the problem's ratio as `requested_ratio` (all checked).
        `bs_exp.rank_budget.make_plan` makes it from ranks. At a ratio of 1 everything is dense; ConfigError for a
        ratio out of (0, 1].
        """


@runtime_checkable
class MeasuredAllocation(Allocation, Protocol):
    """An allocation that measures plans before it decides, and so needs a `score` in its problem."""

    @property
    def measured_by(self) -> PlanObjective: ...

    def check_search(self, identity: Mapping[str, Any]) -> None:
        """ConfigError if a search with this `Score.identity` cannot start or go on; called before any work."""


class Calibration(Protocol):
    """The token sequences on which statistics are gathered."""

    @property
    def batch_size(self) -> int: ...

    def windows(self, tokenizer: PreTrainedTokenizerBase) -> TokenWindows:
        """Windows of equal length, the same for the same settings and text.

        Ids are whole numbers `[windows, length]`; `provenance["sha256"]` is a hash of the ids, under which statistics
        are cached (both checked). `bs_exp.corpora.windows` has what makes them of a corpus.
        """


class Schedule(Protocol):
    """The rounds of compression in which the model is brought down to the budget."""

    def next_ratio(self, current: float, target: float, loss_at: Callable[[float], float]) -> float:
        """The retained share to compress to next: below `current`, and `target` in the last round (checked).

        `loss_at` predicts the loss at a retained share from the statistics of the model compressed so far.
        """


@dataclass(frozen=True, eq=False)
class Contest:
    """How candidate recipes are compared: compressed on `training`, measured by `objective` on `held_out` windows.

    With `single_round` they are measured after one round of compression, whatever their schedule. With `recalibrate`
    the best one is then compressed again with all windows.
    """

    training: TokenWindows
    held_out: TokenWindows
    objective: PlanObjective
    single_round: bool
    recalibrate: bool


class Selection(Protocol):
    """Chooses among several recipes."""

    @property
    def candidates(self) -> Mapping[str, Mapping[str, Any]]:
        """Candidate's name -> the parts of the recipe that it replaces, with their strategies; empty: no selection."""

    def contest(self, windows: TokenWindows) -> Contest:
        """How the candidates are compared on the calibration windows.

        Both parts together are the windows, none is in both, and each has a hash of its own. ValueError if there are no
        candidates.
        """


class Update(Protocol):
    """Changes the factors after truncation.

    `reads_windows` says whether the calibration windows are read; where no strategy does, there are none. An update may
    also have `is_traceable`, true if `apply` does the same whatever the values are, once for every batch: an estimate
    then runs it on tensors that hold none. What others take is not estimated.
    """

    @property
    def reads_windows(self) -> bool: ...

    def check(self, dense: LoadedModel, data: CalibrationData) -> None:
        """ConfigError or DataError if the settings do not fit the model or the windows; called before any work."""

    def apply(
        self,
        compressed: PreTrainedModel,
        dense: LoadedModel,
        plan: RankPlan,
        data: CalibrationData,
        workspace: Workspace,
    ) -> Mapping[str, Any]:
        """Changes the factors of the compressed model in place, and returns a report as plain data, empty for none.

        `plan` says which groups are factorised, and at which retained share. Only values change, shapes and names stay,
        and the dense model is as before (both checked). All parameters that are no factors are the dense model's own,
        and stay so; an update that trains some of them puts copies in their place first (`surgery.own_parameters`). Who
        shares still shares. `requires_grad` and `grad` of all parameters are afterwards as before.
        """


@runtime_checkable
class UpdatesRounds(Update, Protocol):
    """An update that may also be applied after every round of a schedule, before the next one takes its statistics."""

    @property
    def every_round(self) -> bool: ...


@runtime_checkable
class UpdatesInSteps(Update, Protocol):
    """An update that gathers statistics of the model anew in every step, and measures the loss on held-out windows.

    An estimate counts its passes, and traces `on_group`.
    """

    @property
    def gathers(self) -> frozenset[Statistic]: ...

    @property
    def steps(self) -> int:
        """How many steps there are at most."""

    @property
    def windows(self) -> int | None:
        """How many windows a step reads; None: all."""

    @property
    def holdout(self) -> float:
        """The share of the windows on which the loss is measured."""

    @property
    def trials(self) -> int:
        """How often that is done in a step, about."""

    def on_group(self, found: GroupStatistics, factors: SharedFactors) -> None:
        """What a step does with the statistics and the factors of one group, trials included, but no pass and without
        their layout, which asks for values."""

    @property
    def otherwise(self) -> Update | None:
        """What models get that it does not serve; None: nothing."""

    def serves(self, dense: LoadedModel) -> bool:
        """Whether the model can have this update."""


class Precision(Protocol):
    """Stores the matrices that were compressed in fewer bits, after all else is done to them.

    `reads_windows` says whether the calibration windows are read; where no strategy does, there are none.
    """

    @property
    def reads_windows(self) -> bool: ...

    def check(self, dense: LoadedModel, data: CalibrationData) -> None:
        """ConfigError or ModelError if the settings do not fit the model; called before any work."""

    def apply(
        self,
        compressed: PreTrainedModel,
        dense: LoadedModel,
        plan: RankPlan,
        data: CalibrationData,
        workspace: Workspace,
    ) -> Mapping[str, Any]:
        """Stores the matrices of the plan's groups anew, in place, and returns a report as plain data, empty for none.

        Groups that are dense too: without factors, it is the dense model that is stored in fewer bits. The modules of
        other matrices, embeddings, head and norms keep the Parameters that they have (checked), and who shared a basis
        shares what it became. The model computes with what is stored: saved and loaded, it gives the same bits.
        """


class Evaluator(Protocol):
    """Measures a model, in the same way for dense and compressed ones."""

    def check(self, model: LoadedModel) -> None:
        """ConfigError or ModelError if the settings do not fit this model; cheap, and called before any work."""

    def evaluate(self, model: LoadedModel) -> Mapping[str, float | str]:
        """Metrics by name, such as `ppl/wikitext2`, `acc/piqa`, `throughput/decode_tok_s`.

        Values that are text describe how the numbers were measured (device, dtype, hash of the text). The model is
        as before afterwards. No two evaluators of a run report the same name.
        """


class RunReport(Protocol):
    """Makes something to look at of one run."""

    def write(self, folder: Path) -> Path:
        """The folder of its files, made from the record in the run's `folder`; RecordError if that cannot be done."""


@runtime_checkable
class ReadsContent(Protocol):
    """An evaluator or a calibration whose results can be kept: it says by content what it reads besides the model."""

    def content(self) -> Mapping[str, str]:
        """By name a hash of everything that is read (texts, items of tasks), so that what changes is noticed.

        Settings, the model, the tokenizer and code need not be in it.
        """


class WindowSource(Protocol):
    """A text and how it is cut. As with other strategies, all that windows depend on is in its fields."""

    def windows(self, tokenizer: PreTrainedTokenizerBase) -> TokenWindows:
        """Windows of equal length, the same for the same settings and text; DataError if the text cannot be read."""


@runtime_checkable
class ReadsWindows(Evaluator, Protocol):
    """An evaluator that judges by tokenised windows, which may have been cut before, by another process too.

    `evaluate` cuts them itself.
    """

    def texts(self) -> Mapping[str, WindowSource]:
        """What to cut, under the names that `content` (`ReadsContent`) has for the same texts."""

    def evaluate_windows(self, model: LoadedModel, windows: Mapping[str, TokenWindows]) -> Mapping[str, float | str]:
        """What `evaluate` finds, on windows that were cut with the model's tokenizer, by the names of `texts`."""


@runtime_checkable
class PairedEvaluator(Evaluator, Protocol):
    """An evaluator that measures the dense and the compressed model of a run together, since only so can they be
    compared. `evaluate` measures a model that stands alone."""

    def compared(self, dense: LoadedModel) -> tuple[str, ...]:
        """Names of numbers that `compare` always finds of the compressed model; these can be objectives."""

    def compare(
        self, dense: LoadedModel, compressed: LoadedModel
    ) -> tuple[Mapping[str, float | str], Mapping[str, float | str]]:
        """The metrics of the dense and of the compressed model, as `evaluate` names them. Both are as before."""


class TrackedRun(Protocol):
    """An open run of a tracker."""

    def log(self, metrics: Mapping[str, object]) -> None:
        """Logs metrics by name."""

    def finish(self, record: Mapping[str, object]) -> None:
        """Closes the run with its final record, whatever its status."""


class Tracker(Protocol):
    """Logs runs besides their records. Its methods raise TrackingError on failure; the run then goes on without it."""

    def start(self, record: Mapping[str, object], folder: Path) -> TrackedRun:
        """Opens the run; files of the tracker go under `folder`."""
