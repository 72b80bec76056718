"""How close the outputs of a compressed model stay to those of the dense one: the score of searches and selections."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from bs_exp.cache import content_key
from bs_exp.corpora.sampling import evenly_spaced
from bs_exp.errors import ConfigError
from bs_exp.factorization.factors import Decompositions
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.divergence import kl_divergence, precise, rows_at_once
from bs_exp.models.model_inputs import IGNORED, Inputs, check_has_logits, feeder, hidden_states
from bs_exp.models.surgery import replace_matrices, twin
from bs_exp.protocols import PlanObjective
from bs_exp.types import CalibrationData, LoadedModel, RankPlan, Task, TokenWindows, WeightGroup
from bs_exp.workspace import Workspace

Item = TypeVar("Item")

KIND = "score"
_NEED_LOGITS = ("perplexity", "kl")


def check_measurable(model: LoadedModel, objective: PlanObjective, windows: TokenWindows) -> None:
    """ConfigError if the model lacks the outputs that the objective compares, or windows are too few or too short."""
    if objective.objective in _NEED_LOGITS:
        try:
            check_has_logits(model, f"objective={objective.objective}")
        except ConfigError as error:
            error.add_note("objective=cosine compares the hidden states of a model without a head.")
            raise
    if model.task is not Task.ENCODER:
        feeder(model, windows.feeding).examples(windows.ids[:1])
    wanted, available = objective.num_windows, len(windows.ids)
    if wanted is not None and wanted > available:
        raise ConfigError(
            f"num_windows must be at most the number of calibration windows to measure on, which is {available}, got "
            f"{wanted}. Lower it (null takes all), or raise calibration.num_sequences."
        )


def spread_windows(windows: TokenWindows, count: int | None) -> Int[Tensor, "count length"]:
    """Token ids of `count` of the windows, evenly spaced; None, or more than there are, gives all, not copied."""
    ids = windows.ids
    return ids if count is None or count >= len(ids) else ids[evenly_spaced(len(ids), count)]


@dataclass(frozen=True, eq=False)
class _Batch:
    """Inputs on the model's device, the `labels` of the counted positions, and which positions are `counted`."""

    inputs: Inputs
    labels: Int[Tensor, " counted"] | None
    counted: Bool[Tensor, "windows positions"]


@dataclass(frozen=True, eq=False)
class _Reading:
    """How outputs are computed: `rows` of the model for its tokens, and the `head` that turns rows into outputs.

    Usually rows are last hidden states, and the dense model's are kept: they take far less memory than logits. Where
    the logits are more than one matrix away from the hidden states (a cap, a scale, further layers), rows are the
    logits themselves, and the dense model computes its own anew whenever they are compared.
    """

    rows: Callable[[PreTrainedModel, Inputs], Tensor]
    head: Callable[[Tensor], Tensor]
    keeps: bool
    width: int


@dataclass(eq=False, kw_only=True)
class Comparison:
    """Measures models against the dense one they were made from, on windows of text. Lower is better.

    The dense model's outputs are computed once.
    """

    dense: LoadedModel
    data: CalibrationData
    objective: PlanObjective

    def measure(self, module: PreTrainedModel) -> float:
        """The objective of a twin of the dense model; infinity if its outputs are not finite."""
        *_, value = self.running(module)
        return value

    def running(self, module: PreTrainedModel) -> Iterator[float]:
        """The objective over the batches so far, after each of them."""
        total, count = 0.0, 0
        for position, batch in enumerate(self._batches):
            total += self._sum(module, position)
            count += int(batch.counted.sum())
            yield total / count if math.isfinite(total) else math.inf

    @cached_property
    def _batches(self) -> list[_Batch]:
        ids = spread_windows(self.data.windows, self.objective.num_windows)
        return [self._batch(part.to(self.dense.device)) for part in ids.split(self.data.batch_size)]

    def _batch(self, ids: Tensor) -> _Batch:
        feed = feeder(self.dense, self.data.windows.feeding)
        if self.dense.task is Task.ENCODER:
            return _Batch(feed.inputs(ids), None, torch.ones_like(ids, dtype=torch.bool))
        examples = feed.examples(ids)
        counted = examples.labels != IGNORED
        return _Batch(examples.inputs, examples.labels[counted], counted)

    @cached_property
    @torch.no_grad()
    def _reading(self) -> _Reading:
        module = self.dense.module
        if self.dense.task is Task.ENCODER:
            return _Reading(hidden_states, _as_is, keeps=True, width=int(module.config.hidden_size))
        inputs = {
            name: value[:1] if isinstance(value, Tensor) else value for name, value in self._batches[0].inputs.items()
        }
        logits = _logits(module, inputs)
        head = module.get_output_embeddings()
        hidden = hidden_states(module, inputs)
        # A plain decoder may apply its head itself, and give out logits as its hidden states.
        fits = isinstance(head, nn.Module) and getattr(head, "in_features", hidden.shape[-1]) == hidden.shape[-1]
        if fits and not isinstance(head, nn.Embedding) and _same(head(hidden), logits):
            return _Reading(hidden_states, head, keeps=True, width=logits.shape[-1])
        return _Reading(_logits, _as_is, keeps=False, width=logits.shape[-1])

    @cached_property
    def _kept(self) -> list[Tensor]:
        """The dense model's rows for every batch, on the CPU."""
        return [self._rows(self.dense.module, position).cpu() for position in range(len(self._batches))]

    def _rows(self, module: PreTrainedModel, position: int) -> Float[Tensor, "counted channels"]:
        batch = self._batches[position]
        return self._reading.rows(module, batch.inputs)[batch.counted]

    @torch.no_grad()
    def _sum(self, module: PreTrainedModel, position: int) -> float:
        """The objective summed over the tokens of a batch."""
        rows, labels = self._rows(module, position), self._batches[position].labels
        target = labels
        if self.objective.objective != "perplexity":
            kept = self._kept[position] if self._reading.keeps else self._rows(self.dense.module, position)
            target = kept.to(rows.device)
        assert target is not None
        size = rows_at_once(self._reading.width)
        return sum(self._piece(own, other) for own, other in zip(rows.split(size), target.split(size), strict=True))

    def _piece(self, rows: Tensor, target: Tensor) -> float:
        outputs = _precise(self._reading.head(rows))
        if self.objective.objective == "perplexity":
            return float(functional.cross_entropy(outputs, target, reduction="sum"))
        dense = _precise(self._reading.head(target))
        if self.objective.objective == "cosine":
            return float((1.0 - functional.cosine_similarity(outputs, dense, dim=-1)).sum())
        return float(kl_divergence(outputs, dense))


@dataclass(eq=False, kw_only=True)
class PlanScore:
    """Scores plans by measurement: the decompositions are truncated to the plan, and the model runs over the windows.

    A layout stores the same product in another form, so plans of all layouts are measured on plain factors. `keys` name
    the decompositions by content; scores are kept in the cache, so a search that is repeated measures nothing again.
    """

    comparison: Comparison
    decompositions: Decompositions
    keys: Mapping[WeightGroup, str]
    identity: Mapping[str, Any]
    workspace: Workspace

    def __call__(self, plan: RankPlan) -> float:
        *_, value = self.running(plan)
        return value

    def running(self, plan: RankPlan) -> Iterator[float]:
        """The score over the batches so far, after each of them; the last one is the score."""
        key = self._key(plan)
        if entry := self.workspace.cache.find(KIND, key):
            yield from entry.tensor("running").tolist()
            return
        dense, values = self.comparison.dense, []
        module = twin(dense.module)
        factors, folder = self.decompositions.truncated(plan), self.workspace.cache.folder
        replace_matrices(module, dense.architecture, factors, PlainLayout(), folder)
        for value in self.comparison.running(module):
            values.append(value)
            yield value
        self.workspace.cache.store(KIND, key, {"running": torch.tensor(values, dtype=torch.float64)})

    def track(
        self, iterable: Iterable[Item], *, label: str | Callable[[], str], total: int | None = None
    ) -> Iterator[Item]:
        """The items, under a progress bar."""
        return self.workspace.progress.track(iterable, label=label, total=total)

    def _key(self, plan: RankPlan) -> str:
        comparison = self.comparison
        return content_key(
            model=comparison.dense.fingerprint,
            device=comparison.dense.device.type,
            windows=comparison.data.windows.provenance["sha256"],
            feeding=asdict(comparison.data.windows.feeding),
            batch_size=comparison.data.batch_size,
            objective=asdict(comparison.objective),
            ranks=[[self.keys[g.group], g.rank] for g in plan.groups if g.rank is not None],
        )


def _logits(module: PreTrainedModel, inputs: Inputs) -> Tensor:
    logits: Tensor = module(**inputs).logits
    return logits


def _as_is(rows: Tensor) -> Tensor:
    return rows


def _precise(values: Tensor) -> Tensor:
    return values.to(precise(values.dtype))


def _same(found: Tensor, wanted: Tensor) -> bool:
    """Whether two results of one computation are equal up to the rounding of their dtype."""
    tolerance = 2.0 * torch.finfo(wanted.dtype).eps * wanted.abs() + 1e-5 * wanted.abs().max()
    return found.shape == wanted.shape and bool(((found - wanted).abs() <= tolerance).all())
