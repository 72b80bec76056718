"""Factors follow the natural gradient of a loss of the model, a few steps of measured length."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bs_exp import processes
from bs_exp.cache import Cache, Entry, content_key
from bs_exp.calibration.group_statistics import (
    CalibrationStats,
    calibrate,
    check_gatherable,
    gram_dtype,
    statistics_key,
)
from bs_exp.calibration.loss import CalibrationLoss, check_windows, drawn, shared_out
from bs_exp.contracts import check_members
from bs_exp.corpora.sampling import hold_out
from bs_exp.corpora.windows import part_of
from bs_exp.errors import ConfigError, DecompositionError
from bs_exp.identity import identity
from bs_exp.linalg.cholesky import definite
from bs_exp.linalg.natural_gradient import (
    Curvature,
    Line,
    basis_direction,
    conjugate_share,
    natural_gradient,
    vertex_of,
)
from bs_exp.models.fingerprint import as_loaded
from bs_exp.models.kept_factors import KeptFactors
from bs_exp.models.surgery import exchange_factors, factors_of
from bs_exp.protocols import ArrangesAlike, StoredFactors, Update
from bs_exp.types import (
    CalibrationData,
    GroupStatistics,
    LoadedModel,
    RankPlan,
    SharedFactors,
    Statistic,
    Task,
    WeightGroup,
)
from bs_exp.validation import (
    check_at_least,
    check_choice,
    check_number,
    check_positive,
    check_seed,
    check_share,
    is_plain,
    shown,
)
from bs_exp.workspace import Workspace

KIND = "natural_gradient"
LOSSES = ("divergence", "labels")
_NATURAL, _DIRECTION = "natural_step", "direction"
_REPORTED = ("lengths", "held_out_loss", "seconds")
# So often a quarter of the length is tried, until the held-out loss falls: 4^-10 of a first step changes nothing.
_QUARTERS = 10
# A length that is closer to one that was tried is not tried.
_CLOSE = 0.2
# Up to so many numbers in all matrices, what lengths are tried with stays in memory: below 1 GB.
_KEPT_NUMBERS = 2**24


@dataclass(frozen=True, kw_only=True)
class NaturalGradient:
    """`steps` times: all factors move together, against the natural gradient of a loss of the model.

    `loss` is the KL divergence from the dense model's predictions (`divergence`), which is least at the dense model, or
    the model's own loss on the text (`labels`), which goes on to fit the text of calibration. At the compressed weights
    W, D is the gradient of the loss on `windows` windows (drawn by `seed` and the number of the step; None: all), per
    predicted token, H the Gram of a group's inputs and `G_i` that of the gradients at layer i's outputs, damped by
    `ridge` and `damping` (shares of their diagonals). The direction is `H^-1 D_i G_i^-1`, plus b times the direction
    before, b being Polak and Ribiere's (`<D, n> - <D', n>` by `<D', n'>`, with n the natural gradient, D' and n' those
    of the step before; at least 0). Factors of the same rank follow it without a decomposition: the basis moves, and
    the coefficients are fitted to the moved product by least squares in H.

    The length is measured: the search for the least loss on a share `holdout` of the windows, which give no gradient,
    begins at `first_length`, later at the last one. Where no length lowers that loss, the update ends. Every step so
    lowers the held-out loss, and there is no learning rate. A model without a loss of its own gets the update
    `otherwise` instead, or with None keeps its factors. With a cache folder, a finished update is not repeated.

    Amari (1998), natural gradient; its Kronecker factors: Martens and Grosse (1503.05671); conjugate directions: Polak
    and Ribiere (1969).
    """

    loss: str
    steps: int
    windows: int | None
    ridge: float
    damping: float
    holdout: float
    first_length: float
    seed: int
    otherwise: Update | None = None

    reads_windows: ClassVar[bool] = True
    # That and its double, which is too long, and the vertex between them; the next step begins at a length that fits.
    trials: ClassVar[int] = 3
    gathers: ClassVar[frozenset[Statistic]] = frozenset(
        {Statistic.GRAM, Statistic.OUTPUT_GRAM, Statistic.LOSS_GRADIENT}
    )

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, LOSSES)
        check_at_least(1, steps=self.steps, windows=self.windows)
        check_number(0.0, ridge=self.ridge, damping=self.damping)
        check_positive(first_length=self.first_length)
        # Without held-out windows no length can be measured.
        check_share(above=0.0, holdout=self.holdout)
        check_seed(self.seed)
        if self.otherwise is not None:
            if is_plain(self.otherwise):
                raise ConfigError(
                    f"otherwise must be an update with its _target_, or null, got {shown(self.otherwise)}."
                )
            check_members("update", self.otherwise)

    def serves(self, dense: LoadedModel) -> bool:
        """Whether the model has a loss; another gets the update `otherwise`."""
        return dense.task is not Task.ENCODER

    def check(self, dense: LoadedModel, data: CalibrationData) -> None:
        """DataError if there are too few windows to hold some out, ConfigError if there are fewer than processes."""
        if not self.serves(dense):
            if self.otherwise is not None:
                self.otherwise.check(dense, data)
            return
        check_gatherable(dense, data, {f"update={KIND}": self.gathers})
        check_windows(
            KIND,
            windows=self.windows,
            holdout=self.holdout,
            seed=self.seed,
            data=data,
            otherwise="use another update, such as update=mixed_refit",
        )

    def apply(
        self,
        compressed: PreTrainedModel,
        dense: LoadedModel,
        plan: RankPlan,
        data: CalibrationData,
        workspace: Workspace,
    ) -> Mapping[str, Any]:
        """Moves the factors in place; reports the cost, the lengths, and the held-out loss after every step, in nats
        per token."""
        groups = [planned.group for planned in plan.groups if planned.rank is not None]
        if not self.serves(dense):
            other = self.otherwise
            told = "its factors stay" if other is None else f"{type(other).__name__} instead"
            workspace.progress.note(f"natural gradient: this model has no loss of its own; {told}")
            return {} if other is None else dict(other.apply(compressed, dense, plan, data, workspace))
        if not groups:
            workspace.progress.note("natural gradient: there are no factors to move")
            return {"strategy": KIND, "steps": 0, "seconds": 0.0}
        start = time.perf_counter()
        data = replace(data, towards=dense if self.loss == "divergence" else None)
        result = None
        # Several processes would have to agree on who found it.
        if workspace.cache.folder is not None and processes.count() == 1:
            key = self._key(compressed, dense, data, workspace.cache)
            result = KeptFactors(compressed, dense.architecture, workspace.cache, KIND, key)
            if (numbers := result.found(groups, _REPORTED)) is not None:
                steps = len(numbers["lengths"])
                workspace.progress.note(f"natural gradient: the factors after {steps} steps came from the cache")
                return _report(numbers["lengths"], numbers["held_out_loss"], numbers["seconds"][0])
        kept, held = hold_out(len(data.windows.ids), self.holdout, self.seed)
        descent = _Descent(
            compressed,
            dense,
            groups,
            replace(data, windows=part_of(data.windows, kept, name="with gradients")),
            CalibrationLoss(dense, data, data.windows.ids[held]),
            workspace,
        )
        history, lengths, length = [descent.loss()], [], self.first_length
        try:
            for number in range(self.steps):
                found = None
                # What is left of the direction before may lead uphill on other windows: then without it.
                while found is None:
                    conjugate = descent.turn(self, number)
                    found = descent.search(length, history[-1])
                    if found is None and not conjugate:
                        break
                    if found is None:
                        descent.forget()
                processes.same_values(compressed, unlike=dense.module)
                if found is None:
                    break
                length, loss = found
                history.append(loss)
                lengths.append(length)
        finally:
            descent.forget()
        report = _report(lengths, history, round(time.perf_counter() - start, 3))
        workspace.progress.note(
            f"natural gradient: held-out loss {history[0]:.4f} -> {history[-1]:.4f} nats per token in {len(lengths)} "
            f"of {self.steps} steps"
        )
        if result is not None:
            result.keep(groups, {"lengths": lengths, "held_out_loss": history, "seconds": [report["seconds"]]})
        return report

    def on_group(self, found: GroupStatistics, factors: SharedFactors) -> None:
        """What a step does with one group, but for its share of the direction before, and for the layout."""
        curvature = self.curvature(found)
        assert found.loss_gradient is not None
        direction = natural_gradient(found.group, found.loss_gradient, curvature)
        curvature = self.curvature(found)  # anew, as in `turn`: directions of all groups come first
        line = Line.through(factors, direction, basis_direction(factors, direction, curvature), curvature.inputs)
        for _ in range(self.trials):
            line.at(self.first_length, factors)

    def curvature(self, found: GroupStatistics) -> Curvature:
        """Of the loss by the weights of a group, from its Grams: damped, and per token and predicted token."""
        assert found.output_grams is not None
        predictions = found.predictions or found.tokens
        return Curvature(
            inputs=definite(_gram(found), ridge=self.ridge, of="inputs"),
            outputs={
                layer: definite(total / predictions, ridge=self.damping, of="output gradients")
                for layer, total in found.output_grams.items()
                if bool(total.any())
            },
        )

    def _key(self, compressed: PreTrainedModel, dense: LoadedModel, data: CalibrationData, cache: Cache) -> str:
        """Of all that the steps depend on, with the factors in front of the first one."""
        return content_key(
            statistics=statistics_key(as_loaded(compressed, dense), data),
            grams=str(gram_dtype(cache, dense.architecture)),
            settings=identity(self),
        )


def _report(lengths: Sequence[float], history: Sequence[float], seconds: float) -> dict[str, Any]:
    """`history` is the held-out loss before the first step and after each."""
    return {
        "strategy": KIND,
        "steps": len(lengths),
        "lengths": list(lengths),
        "held_out_loss": list(history),
        "seconds": seconds,
    }


class _Stored(NamedTuple):
    """An entry of the cache, and its name there."""

    name: str
    entry: Entry


@dataclass(eq=False)
class _Descent:
    """The factors on their way: what they move along now, and what that depends on from the step before."""

    compressed: PreTrainedModel
    dense: LoadedModel
    groups: Sequence[WeightGroup]
    data: CalibrationData
    held_out: CalibrationLoss
    workspace: Workspace
    _gradients: CalibrationStats | None = None  # of the step before, as long as the next one is sought
    _directions: Mapping[WeightGroup, _Stored] = field(default_factory=dict)
    # Where the present factors begin, and the lines from there on: those that are kept in memory.
    _lines: dict[WeightGroup, tuple[SharedFactors, Line]] = field(default_factory=dict)
    _product: float | None = None  # of gradient and natural gradient
    _made: int = 0  # entries of the cache in front of those of this step

    def __post_init__(self) -> None:
        self._made = len(self.workspace.cache.made)

    def loss(self) -> float:
        """The held-out loss of the model as it is, in nats per predicted token."""
        return self.held_out(self.compressed)

    @torch.no_grad()
    def turn(self, settings: NaturalGradient, number: int) -> bool:
        """Finds the direction at the factors as they are; what the cache holds of the step before goes.

        Whether the direction before has a share in it.
        """
        self._drop(but=(Statistic.LOSS_GRADIENT, _DIRECTION))
        before, self._made = self._made, len(self.workspace.cache.made)
        source = as_loaded(self.compressed, self.dense)
        data = shared_out(drawn(self.data, settings.windows, seed=settings.seed, number=number))
        stats = calibrate(source, data, needs=settings.gathers, workspace=self.workspace)
        # Every process has its own entries, which it alone removes.
        own = {"process": processes.rank()} if processes.count() > 1 else {}
        key = content_key(step=number, statistics=statistics_key(source, data), settings=identity(settings), **own)
        natural: dict[WeightGroup, _Stored] = {}
        product = crossed = 0.0
        for group in self.workspace.progress.track(self.groups, label="natural gradients", total=len(self.groups)):
            gradient = _gradient(stats, group, self._device)
            step = natural_gradient(group, gradient, settings.curvature(self._grams(stats, group)))
            product += float((gradient * step).sum())
            if self._gradients is not None:
                crossed += float((_gradient(self._gradients, group, self._device) * step).sum())
            natural[group] = self._store(_NATURAL, key, group, step=step)
        share = conjugate_share(product, crossed, self._product)
        directions = {}
        for group in self.groups:
            direction = self._read(natural[group], "step")
            if share:
                direction = direction + share * self._read(self._directions[group], "direction")
            present = self._present(group).on(self._device)
            plain, curvature = present.layout.restore(present), settings.curvature(self._grams(stats, group))
            line = Line.through(plain, direction, basis_direction(plain, direction, curvature), curvature.inputs)
            del plain, curvature
            directions[group] = self._store(_DIRECTION, key, group, direction=direction, **vars(line))
            self.workspace.cache.discard([natural[group].name])
        self.workspace.cache.discard([stored.name for stored in self._directions.values()])
        self.workspace.cache.drop(self.workspace.cache.made[before : self._made])
        self._directions, self._product = directions, product
        self._gradients = _only(stats, Statistic.LOSS_GRADIENT)
        return share > 0.0

    @torch.no_grad()
    def search(self, length: float, loss: float) -> tuple[float, float] | None:
        """Moves the factors by the best length found from `length` on; that and its loss, None if none is below `loss`.

        A quarter of the length is tried until the loss falls, and twice the length for as long as it falls further;
        then the vertex of the parabola through the last length, that before and the next one.
        """
        start = {group: self._present(group) for group in self.groups}
        losses = {0.0: loss}
        last = 0.0

        def measured(length: float) -> float:
            nonlocal last
            if length not in losses:
                last = length
                try:
                    self._move(start, length)
                    losses[length] = self.loss()
                except DecompositionError:  # factors that the dtype cannot hold
                    losses[length] = math.inf
            return losses[length]

        for _ in range(_QUARTERS):
            if measured(length) < loss:
                break
            length /= 4.0
        else:
            self._move(start, 0.0)
            self._lines = {}
            return None
        longer = min((tried for tried in losses if tried > length), default=2.0 * length)
        while measured(longer) < measured(length):
            length, longer = longer, 2.0 * longer
        vertex = vertex_of(losses, max(tried for tried in losses if tried < length), length, longer)
        if abs(vertex - length) > _CLOSE * length:
            measured(vertex)
        best = min(losses, key=lambda tried: losses[tried])
        if best != last:
            self._move(start, best)
        self._lines = {}
        return best, losses[best]

    def forget(self) -> None:
        """What there is of the last step goes, in the cache, too; the next one follows the natural gradient alone."""
        self._drop(but=(_DIRECTION,))
        self.workspace.cache.discard([stored.name for stored in self._directions.values()])
        self._made = len(self.workspace.cache.made)
        self._gradients = self._product = None
        self._directions = {}

    def _drop(self, *, but: Collection[str]) -> None:
        """What the cache holds of this step goes, but for some kinds."""
        cache = self.workspace.cache
        cache.drop([name for name in cache.made[self._made :] if name.partition("/")[0] not in but])

    def _move(self, start: Mapping[WeightGroup, StoredFactors], length: float) -> None:
        for stored in start.values():
            moved = self._moved(stored, length) if length else stored
            exchange_factors(self.compressed, self.dense.architecture, moved, self.workspace.cache.folder)

    def _moved(self, stored: StoredFactors, length: float) -> StoredFactors:
        stored = stored.on(self._device)
        start, line = self._lines.get(stored.group) or (stored.layout.restore(stored), self._line(stored.group))
        if sum(group.d_in * group.columns for group in self.groups) <= _KEPT_NUMBERS:
            self._lines[stored.group] = start, line
        layout, moved = stored.layout, line.at(length, start)
        found = layout.arrange_like(moved, stored) if isinstance(layout, ArrangesAlike) else layout.arrange(moved)
        return found.in_dtype(stored.basis.dtype)

    def _line(self, group: WeightGroup) -> Line:
        return Line(**{each.name: self._read(self._directions[group], each.name) for each in fields(Line)})

    def _present(self, group: WeightGroup) -> StoredFactors:
        """The factors of a group; whoever exchanges them puts new Parameters in their place."""
        return factors_of(self.compressed, self.dense.architecture, group)

    def _grams(self, stats: CalibrationStats, group: WeightGroup) -> GroupStatistics:
        return _only(stats, Statistic.GRAM, Statistic.OUTPUT_GRAM).of(group, self._device)

    @property
    def _device(self) -> torch.device:
        return self.dense.device

    def _store(self, kind: str, key: str, group: WeightGroup, **tensors: Tensor) -> _Stored:
        """Tensors in fp32: a direction takes as much as the dense weights, a line about as much again."""
        own = content_key(key=key, group=asdict(group))
        found = {name: tensor.float().cpu() for name, tensor in tensors.items()}
        return _Stored(f"{kind}/{own}", self.workspace.cache.store(kind, own, found))

    def _read(self, stored: _Stored, name: str) -> Tensor:
        return stored.entry.tensor(name).to(self._device).double()


def _only(stats: CalibrationStats, *kinds: Statistic) -> CalibrationStats:
    """Some of the statistics: nobody reads the others."""
    return replace(stats, entries={kind: stats.entries[kind] for kind in kinds})


def _gram(found: GroupStatistics) -> Tensor:
    """Of a group's inputs, per token, averaged over its layers."""
    assert found.gram is not None
    per_token: Tensor = found.gram / (found.tokens * found.group.size)
    return per_token


def _gradient(stats: CalibrationStats, group: WeightGroup, device: torch.device) -> Tensor:
    """Of a group's weights, per predicted token."""
    found = _only(stats, Statistic.LOSS_GRADIENT).of(group, device).loss_gradient
    assert found is not None
    return found
