"""What each stage of a compression does, found by running its own code on tensors that hold no values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from bs_exp.cache import Cache
from bs_exp.calibration.gather import ACCUMULATORS, gather, passes
from bs_exp.calibration.group_statistics import gram_dtype
from bs_exp.calibration.statistics import Accumulator, Loss
from bs_exp.calibration.walk import is_large
from bs_exp.collector import collector_paused
from bs_exp.errors import ModelError
from bs_exp.estimate.ledger import Ledger, Work
from bs_exp.estimate.shapes import first_blocks, repeated
from bs_exp.factorization.factors import stored_rank
from bs_exp.factorization.spectra import GroupMeasures, metric_of
from bs_exp.layout.plain import PlainLayout
from bs_exp.linalg.decomposition import decompose, split_by_layer
from bs_exp.models.blocks import Blocks, states_of
from bs_exp.models.hooks import Hooks
from bs_exp.models.model_inputs import feeder
from bs_exp.models.offload import is_offloaded
from bs_exp.models.outputs import logits_of
from bs_exp.models.surgery import replace_matrices, twin
from bs_exp.pipeline import Recipe
from bs_exp.progress import Progress
from bs_exp.protocols import Update, UpdatesInSteps
from bs_exp.rank_budget import planned_shapes, rank_at
from bs_exp.types import (
    CalibrationData,
    GroupStatistics,
    InputMoments,
    LoadedModel,
    RankPlan,
    SharedFactors,
    Statistic,
    TokenWindows,
    WeightGradient,
    WeightGroup,
)
from bs_exp.update.none import NoUpdate
from bs_exp.workspace import Workspace

_GRAMS = (
    Statistic.GRAM,
    Statistic.OUTPUT_GRAM,
    Statistic.SAMPLED_OUTPUT_GRAM,
    Statistic.TOP_K_OUTPUT_GRAM,
    Statistic.PROBED_OUTPUT_GRAM,
)
_F64 = torch.float64
Result = TypeVar("Result")

# Tensors of a decomposition in the cache.
_IN_FACTORS = 7


@dataclass(eq=False)
class Pass:
    """The windows once through the model: what one batch takes, how often it goes forward and backward through all
    blocks, and the bytes by kind that the statistics take in the cache."""

    work: Work
    forward: int
    backward: int
    stored: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False)
class Traced:
    """What has been traced of one model in one place: points of a sweep ask for the same again.

    Entries are found by equality of all that they depend on; beside each stands what could not be run for it.
    """

    _entries: list[tuple[tuple[object, ...], tuple[Any, Sequence[str]]]] = field(default_factory=list)

    def find(self, key: tuple[object, ...]) -> tuple[Any, Sequence[str]] | None:
        """The entry under a key; None if nothing was kept there."""
        return next((entry for known, entry in self._entries if known == key), None)

    def keep(self, key: tuple[object, ...], entry: tuple[Any, Sequence[str]]) -> None:
        """Keeps an entry under a new key."""
        self._entries.append((key, entry))


@dataclass(eq=False, kw_only=True)
class Tracer:
    """Runs stages of a recipe on a model without values. `data` is one batch of its windows; `unknown` gets what could
    not be run so."""

    ledger: Ledger
    dense: LoadedModel
    recipe: Recipe
    groups: Sequence[WeightGroup]
    data: CalibrationData
    cache: Cache
    known: Traced = field(default_factory=Traced)
    unknown: list[str] = field(default_factory=list)

    def _once(self, key: tuple[object, ...], trace: Callable[[], Result]) -> Result:
        """What is known under the key, or else what `trace` returns."""
        entry = self.known.find(key)
        if entry is None:
            before, self.unknown = self.unknown, []
            try:
                entry = (trace(), self.unknown)
            finally:
                self.unknown = before
            self.known.keep(key, entry)
        found, told = entry
        self.unknown += [each for each in told if each not in self.unknown]
        return cast(Result, found)

    def gathering(self, statistics: frozenset[Statistic]) -> Iterator[Pass]:
        """The passes that gather statistics, one after the other."""
        windows, architecture = self.data.windows, self.dense.architecture
        batch = (tuple(windows.ids.shape), windows.feeding, self.data.batch_size, self.data.probes)
        for loss, chosen in passes(self.dense, statistics):
            trace = partial(self._in_depth, partial(self._gathering, loss, chosen))
            key = ("gather", loss, frozenset(chosen), batch, architecture, tuple(self.groups), self._gram_dtype)
            yield self._once(key, trace)

    def _gathering(
        self, loss: Loss | None, chosen: Sequence[Statistic], model: LoadedModel, groups: Sequence[WeightGroup]
    ) -> Pass:
        stored: Counter[str] = Counter()
        # Drawn labels are values; gradients of given ones take as much.
        traced = {_plain(statistic): statistic for statistic in chosen}
        with self.ledger.counting() as work:
            for statistic, _, tensors in gather(model, self.data, set(traced), progress=_QUIET):
                kind = traced[statistic]
                sizes = (self._stored_bytes(kind, name, found) for name, found in tensors.items())
                stored[kind] += file_bytes(len(tensors)) + sum(sizes)
                del tensors
        checked = self._check(model) if is_large(model) else None
        if checked is not None:
            work = work.without(checked)
        # Backward, blocks are computed again from their inputs, one by one or all in one pass.
        forward = 1 if loss is None else 1 + is_large(model)
        backward = 0 if loss is None else self.data.probes.count if loss == "probes" else 1
        return Pass(work, forward, backward, stored)

    def _in_depth(self, found: Callable[[LoadedModel, Sequence[WeightGroup]], Pass]) -> Pass:
        """What a pass through the whole model takes; where its blocks repeat, from that through the first of them."""
        step = repeated(self.dense, self.groups)
        if step is None:
            return found(self.dense, self.groups)
        # What is in a cycle lives until the collector comes by. If it did so in one of the two alone, their difference
        # would be taken for that of a block, and multiplied by all of them.
        with collector_paused():
            one, two = (
                found(first_blocks(self.dense, depth), [group for group in self.groups if group.blocks[-1] < depth])
                for depth in (2 * step, 3 * step)
            )
        steps = len(self.dense.architecture.blocks) / step - 3
        more = {kind: steps * (size - one.stored[kind]) for kind, size in two.stored.items()}
        stored = two.stored + Counter({kind: round(size) for kind, size in more.items()})
        return Pass(one.work.extended(two.work, steps), two.forward, two.backward, stored)

    def _check(self, model: LoadedModel) -> Work | None:
        """What it takes to see whether blocks can be run one at a time; None if they cannot."""
        with self.ledger.counting() as work:
            reader = feeder(model, self.data.windows.feeding)
            inputs = reader.inputs(self.data.windows.ids[:1].to(model.device))
            try:
                Blocks(model).check(inputs, inputs)
            except ModelError:
                return None
        return work

    def _stored_bytes(self, kind: Statistic, name: str, tensor: Tensor) -> int:
        if kind in _GRAMS and name == "gram":
            size = len(tensor)
            return size * (size + 1) // 2 * self._gram_dtype.itemsize
        return tensor.nbytes

    @property
    def _gram_dtype(self) -> torch.dtype:
        return gram_dtype(self.cache, self.dense.architecture)

    def decomposing(self) -> Iterator[tuple[WeightGroup, Work]]:
        """What the decomposition of each group takes; groups of equal shapes take the same."""
        known: dict[tuple[int, ...], Work] = {}
        for group in self.groups:
            shape = (group.d_in, group.d_out, group.size, group.correction)
            if shape not in known:
                known[shape] = self._known_decomposition(group)
            yield group, known[shape]

    def _known_decomposition(self, group: WeightGroup) -> Work:
        recipe = self.recipe
        strategies = (recipe.whitening, recipe.importance, recipe.round_needs)
        stored = (self.stored_rank(group), self._gram_dtype, self._measures().factor_dtype)
        key = ("decompose", group, strategies, stored, self.data.windows.ids.numel())
        return self._once(key, partial(self._decomposition, group))

    def _decomposition(self, group: WeightGroup) -> Work:
        measures = self._measures()
        with self.ledger.counting() as work:
            given = self._statistics(group, self.recipe.round_needs)
            with self._may_look_at_values(self.recipe.whitening, self.recipe.importance):
                metric = metric_of(given, self.recipe.whitening, self.recipe.importance)
                del given
                found = decompose(group, measures.weight(group), metric)
                rank = self.stored_rank(group)
                _ = [rows[:rank].to("cpu", measures.factor_dtype) for rows in (found.basis_t, found.coefficients)]
        return work

    def stored_rank(self, group: WeightGroup) -> int:
        """How many components of a group the cache gets."""
        return stored_rank(group, None if Statistic.LOSS_GRADIENT in self.recipe.needs else self.recipe.layout)

    def stored_factors(self, group: WeightGroup) -> int:
        """Bytes of a group's factors and spectrum in the cache."""
        numbers = self.stored_rank(group) * (group.d_in + group.columns)
        return numbers * self._measures().factor_dtype.itemsize + 16 * group.full_rank + file_bytes(_IN_FACTORS)

    def _measures(self) -> GroupMeasures:
        return GroupMeasures(
            dense=self.dense,
            current=self.dense,
            data=self.data,
            needs=frozenset(),
            whitening=self.recipe.whitening,
            importance=self.recipe.importance,
            workspace=Workspace(self.cache, _QUIET),
        )

    def _statistics(self, group: WeightGroup, needs: Collection[Statistic]) -> GroupStatistics:
        """Statistics of a group's shapes, read as the cache has them."""
        layers, device = group.layers, self.dense.device

        def gram(size: int) -> Tensor:
            packed = torch.empty(size * (size + 1) // 2, dtype=self._gram_dtype)
            whole = torch.empty(size, size, dtype=_F64)
            del packed
            return whole.to(device)

        def summed() -> Tensor:
            total = gram(group.d_in)
            for _ in layers[1:]:
                total = total + gram(group.d_in)
            return total

        def outputs(statistic: Statistic) -> dict[int, Tensor] | None:
            return {layer: gram(group.d_out) for layer in layers} if statistic in needs else None

        def rows(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=_F64, device=device)

        return GroupStatistics(
            group=group,
            tokens=self.data.windows.ids.numel(),
            predictions=self.data.windows.ids.numel(),
            gram=summed() if Statistic.GRAM in needs else None,
            output_grams=outputs(Statistic.OUTPUT_GRAM),
            sampled_grams=outputs(Statistic.SAMPLED_OUTPUT_GRAM),
            top_k_grams=outputs(Statistic.TOP_K_OUTPUT_GRAM),
            probed_grams=outputs(Statistic.PROBED_OUTPUT_GRAM),
            probed_outputs=self.data.windows.ids.numel(),
            moments=InputMoments(*(rows(group.d_in) for _ in range(3))) if Statistic.INPUT_MOMENTS in needs else None,
            weight_gradient=WeightGradient(rows(group.d_in), 1.0) if Statistic.WEIGHT_GRADIENT in needs else None,
            loss_gradient=rows(group.d_in, group.columns) if Statistic.LOSS_GRADIENT in needs else None,
        )

    def replacing(self, ratio: float) -> Iterator[tuple[WeightGroup, Work]]:
        """What it takes to bring the factors of each group into their layout at a retained share."""
        known: dict[tuple[int, ...], Work] = {}
        for group in self.groups:
            rank = rank_at(group, ratio, self.recipe.layout)
            if not rank:
                continue
            shape = (group.d_in, group.d_out, group.size, rank)
            if shape not in known:
                known[shape] = self._replacement(group, rank)
            yield group, known[shape]

    def reading(self) -> Pass:
        """One batch through the model, to its logits and their loss."""
        batch = (tuple(self.data.windows.ids.shape), self.data.windows.feeding)
        key = ("read", batch, self.dense.architecture, tuple(self.groups))
        return self._once(key, partial(self._in_depth, self._reading))

    def _reading(self, model: LoadedModel, groups: Sequence[WeightGroup]) -> Pass:
        with self.ledger.counting() as work:
            examples = feeder(model, self.data.windows.feeding).examples(self.data.windows.ids.to(model.device))
            for logits in logits_of(model, [examples.inputs]):
                examples.loss(logits, reduction="sum")
        checked = self._check(model) if is_offloaded(model.module) else None
        return Pass(work if checked is None else work.without(checked), 1, 0)

    def stepping(self, update: UpdatesInSteps, ratio: float) -> Iterator[tuple[WeightGroup, Work]]:
        """What one step of an update does with the statistics and the factors of each group."""
        known: dict[tuple[int, ...], Work] = {}
        for group in self.groups:
            rank = rank_at(group, ratio, self.recipe.layout)
            if not rank:
                continue
            shape = (group.d_in, group.d_out, group.size, rank)
            if shape not in known:
                key = ("step", shape, update, self._gram_dtype)
                known[shape] = self._once(key, partial(self._step, update, group, rank))
            yield group, known[shape]

    def _step(self, update: UpdatesInSteps, group: WeightGroup, rank: int) -> Work:
        with self.ledger.counting() as work, self._may_look_at_values(update):
            update.on_group(self._statistics(group, update.gathers), self._factors(group, rank))
        return work

    def _replacement(self, group: WeightGroup, rank: int) -> Work:
        with self.ledger.counting() as work:
            factors = self._factors(group, rank)
            with self._may_look_at_values(self.recipe.layout):
                self.recipe.layout.arrange(factors)
        return work

    def _factors(self, group: WeightGroup, rank: int) -> SharedFactors:
        dtype = self._measures().factor_dtype
        read = [torch.empty(rank, size, dtype=dtype) for size in (group.d_in, group.columns)]
        return split_by_layer(group, read[0].double(), read[1].double())

    def updating(self, update: Update, ratio: float, batches: int) -> Pass | None:
        """What an update takes with so many batches, in memory with two of them; None if that cannot be known. The
        compressed model is the caller's to count."""
        if isinstance(update, NoUpdate):
            return Pass(Work(), 0, 0)
        if not getattr(update, "is_traceable", False):
            self._not_counted(update)
            return None
        one = self._in_depth(partial(self._updating, update, ratio, 1))
        if batches == 1:
            return one
        # What is done for every batch is the difference that one more makes.
        two = self._in_depth(partial(self._updating, update, ratio, 2))
        work = one.work.extended(two.work, batches - 2)
        work.host_bytes, work.device_bytes = two.work.host_bytes, two.work.device_bytes
        return Pass(work, two.forward - one.forward, 0)

    def _updating(
        self, update: Update, ratio: float, batches: int, model: LoadedModel, groups: Sequence[WeightGroup]
    ) -> Pass:
        plan = self.plan(ratio, groups)
        module = twin(model.module)
        with self.ledger:
            factors = (self._factors(planned.group, planned.rank) for planned in plan.groups if planned.rank)
            replace_matrices(module, model.architecture, factors, PlainLayout())
        windows = replace(self.data.windows, ids=self.data.windows.ids.repeat(batches, 1))
        data = replace(self.data, windows=windows)
        calls = Counter[str]()

        def count(arguments: tuple[Any, ...], keywords: Mapping[str, Any], output: Any) -> None:
            given = arguments[0] if arguments else keywords.get("hidden_states")
            calls["forward"] += states_of(output) is not given  # else the block was left out

        last = model.architecture.blocks[-1]
        with Hooks() as hooks, self._may_look_at_values(update), self.ledger.counting() as work:
            for part in (module, model.module):
                hooks.on_call(part.get_submodule(last), count)
            update.apply(module, model, plan, data, Workspace(Cache(None), _QUIET))
        return Pass(work, calls["forward"], 0)

    def plan(self, ratio: float, groups: Sequence[WeightGroup] | None = None) -> RankPlan:
        """Ranks of one share for all groups, within their budgets, or for some of them."""
        chosen = self.groups if groups is None else groups
        ranks = [rank_at(group, ratio, self.recipe.layout) for group in chosen]
        return planned_shapes(chosen, ranks, ratio, self.recipe.layout)

    @contextmanager
    def _may_look_at_values(self, *strategies: object) -> Iterator[None]:
        """Code of strategies, of others too, which may fail where there are no values: what it takes is not known."""
        try:
            yield
        except Exception as error:  # anything can follow from values that are none
            self._not_counted(*strategies, reason=f"{type(error).__name__}: {str(error).splitlines()[0]:.100}")

    def _not_counted(self, *strategies: object, reason: str = "it says nothing of what it takes") -> None:
        named = ", ".join(type(strategy).__name__ for strategy in strategies)
        told = f"{named}: seconds and memory of its own are not counted ({reason})"
        if told not in self.unknown:
            self.unknown.append(told)


_QUIET = Progress(quiet=True)


def _plain(statistic: Statistic) -> Statistic:
    """The statistic of the text's own labels that takes as much as one of drawn labels; probes need no labels."""
    if ACCUMULATORS[statistic].loss == "probes":
        return statistic
    kinds: Mapping[type[Accumulator], Statistic] = {kind: found for found, kind in ACCUMULATORS.items()}
    return next(kinds[kind] for kind in reversed(ACCUMULATORS[statistic].__mro__) if kind in kinds)


def file_bytes(tensors: int) -> int:
    """Bytes of a file in the cache beside its tensors: names, checksums and the key in its header, about."""
    return 128 + 120 * tensors


def one_batch(count: int, length: int, batch_size: int, data: CalibrationData | None = None) -> CalibrationData:
    """Windows of zeros: one batch, which waits in memory."""
    windows = TokenWindows(ids=torch.zeros(min(count, batch_size), length, dtype=torch.long), provenance={"sha256": ""})
    if data is not None:
        windows = replace(windows, feeding=data.windows.feeding)
    return CalibrationData(windows, batch_size, "memory")
