"""Calibration statistics, gathered once, kept in the cache, and read one group at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from bs_exp import processes
from bs_exp.cache import Cache, Entry, content_key
from bs_exp.calibration.gather import ACCUMULATORS, gather
from bs_exp.calibration.probes import check_probes, outputs_of
from bs_exp.calibration.rare_experts import (
    filled_moments,
    lacking,
    mean_gram,
    mean_rows,
    told_of,
    wanted_tokens,
)
from bs_exp.calibration.statistics import Place, subjects
from bs_exp.linalg.packing import pack_symmetric, unpack_symmetric
from bs_exp.models.model_inputs import check_has_logits, feeder
from bs_exp.types import (
    Architecture,
    CalibrationData,
    GroupStatistics,
    InputMoments,
    LoadedModel,
    Statistic,
    Task,
    WeightGradient,
    WeightGroup,
    WeightMatrix,
)
from bs_exp.workspace import Workspace

WITH_GRADIENTS = frozenset(statistic for statistic, kind in ACCUMULATORS.items() if kind.loss is not None)
PROBED = frozenset(statistic for statistic in WITH_GRADIENTS if ACCUMULATORS[statistic].loss == "probes")
WITH_LOSS = WITH_GRADIENTS - PROBED
# Statistics of input sites and of matrices, in contrast to those of whole blocks.
OF_MATRICES = frozenset(s for s, kind in ACCUMULATORS.items() if kind.place in (Place.INPUT, Place.OUTPUT_GRADIENT))
_OUTPUT_GRAMS = (
    Statistic.OUTPUT_GRAM,
    Statistic.SAMPLED_OUTPUT_GRAM,
    Statistic.TOP_K_OUTPUT_GRAM,
    Statistic.PROBED_OUTPUT_GRAM,
)
_GRAMS = frozenset({Statistic.GRAM, *_OUTPUT_GRAMS})


@dataclass(frozen=True, eq=False)
class CalibrationStats:
    """Entries by statistic and by what they belong to: input sites, or modules for what is taken at outputs.

    Only those of the group that is asked for are in memory, and the means of the experts of a layer.
    """

    architecture: Architecture
    tokens: int
    predictions: int
    outputs: int
    entries: Mapping[Statistic, Mapping[str, Entry]]
    _means: dict[Statistic, tuple[str, Tensor]] = field(default_factory=dict)

    def of(self, group: WeightGroup, device: torch.device) -> GroupStatistics:
        """The statistics of a group. Its Gram is the sum of its layers': the Gram of their inputs stacked
        (Basis Sharing, section 3.1). Its moments are those of their inputs stacked, too. Of experts that few tokens
        were sent to, average tokens are in them (`rare_experts`)."""
        matrices = [self.architecture.by_position[group.matrix, layer] for layer in group.layers]
        gram, moments, gradient, loss_gradient = None, None, None, None
        tokens = self.tokens
        if found := self.entries.get(Statistic.GRAM):
            gram = _sum(self._input_gram(found, m).to(device) for m in matrices)
            # An encoder and its decoder read different numbers of tokens, and so do experts.
            read = [self._tokens(m) for m in matrices]
            tokens = round(sum(n + lacking(m, n) for m, n in zip(matrices, read, strict=True)) / len(matrices))
        output_grams, sampled, top_k, probed = (self._output_grams(kind, matrices, device) for kind in _OUTPUT_GRAMS)
        if found := self.entries.get(Statistic.INPUT_MOMENTS):
            moments = _moments([self._moments(found, m) for m in matrices], device)
        if found := self.entries.get(Statistic.WEIGHT_GRADIENT):
            gradient = self._gradient(found, matrices, self.architecture.of_type(group.matrix), device)
        if found := self.entries.get(Statistic.LOSS_GRADIENT):
            by_matrix = [found[m.module].tensor("gradient").to(device).double() for m in matrices]
            loss_gradient = torch.cat(by_matrix, dim=1) / self.predictions
        return GroupStatistics(
            group=group,
            tokens=tokens,
            gram=gram,
            output_grams=output_grams,
            moments=moments,
            weight_gradient=gradient,
            predictions=self.predictions,
            loss_gradient=loss_gradient,
            sampled_grams=sampled,
            top_k_grams=top_k,
            probed_grams=probed,
            probed_outputs=self.outputs if probed else None,
        )

    def _output_grams(
        self, statistic: Statistic, matrices: Sequence[WeightMatrix], device: torch.device
    ) -> dict[int, Tensor] | None:
        found = self.entries.get(statistic)
        if not found:
            return None
        return {m.place: self._output_gram(statistic, found, m).to(device) for m in matrices}

    def _tokens(self, matrix: WeightMatrix) -> int:
        """How many tokens a matrix read; without Grams all that is known is whether any did."""
        return _tokens(self.entries, matrix)

    def _input_gram(self, found: Mapping[str, Entry], matrix: WeightMatrix) -> Tensor:
        own = _gram(found[matrix.input_site])
        if not (missing := lacking(matrix, self._tokens(matrix))):
            return own
        experts = self.architecture.experts_of(matrix.matrix, matrix.layer)
        key = ",".join(m.input_site for m in experts)
        return own + missing * self._mean(Statistic.GRAM, key, matrix, [found[m.input_site] for m in experts])

    def _output_gram(self, statistic: Statistic, found: Mapping[str, Entry], matrix: WeightMatrix) -> Tensor:
        own = _gram(found[matrix.module])
        if Statistic.GRAM not in self.entries or not (missing := lacking(matrix, self._tokens(matrix))):
            return own
        experts = self.architecture.experts_of(matrix.matrix, matrix.layer)
        key = ",".join(m.module for m in experts)
        return own + missing * self._mean(statistic, key, matrix, [found[m.module] for m in experts])

    def _mean(self, statistic: Statistic, key: str, matrix: WeightMatrix, entries: Sequence[Entry]) -> Tensor:
        """The mean of the experts of a layer; the last one of each statistic is kept, since groups come by layer."""
        if self._means.get(statistic, ("",))[0] != key:
            read = map(self._tokens, self.architecture.experts_of(matrix.matrix, matrix.layer))
            grams = ((_gram(entry), tokens) for entry, tokens in zip(entries, read, strict=True))
            self._means[statistic] = key, mean_gram(grams, matrix, outputs=statistic is not Statistic.GRAM)
        return self._means[statistic][1]

    def _moments(self, found: Mapping[str, Entry], matrix: WeightMatrix) -> InputMoments:
        own = _read_moments(found[matrix.input_site])
        if matrix.expert is None:
            return own
        others = [
            (_read_moments(found[m.input_site]), self._tokens(m))
            for m in self.architecture.experts_of(matrix.matrix, matrix.layer)
        ]
        return filled_moments(own, others, matrix, self._tokens(matrix))

    def _gradient(
        self,
        found: Mapping[str, Entry],
        matrices: Sequence[WeightMatrix],
        of_type: Sequence[WeightMatrix],
        device: torch.device,
    ) -> WeightGradient:
        def rows_of(matrix: WeightMatrix) -> Tensor:
            own = found[matrix.module].tensor("rows")
            if matrix.expert is None or bool(own.any()):
                return own
            others = [found[m.module].tensor("rows") for m in self.architecture.experts_of(matrix.matrix, matrix.layer)]
            return mean_rows(others, matrix)

        rows = _sum(map(rows_of, matrices))
        here = float(rows.sum()) / len(matrices)
        everywhere = sum(float(found[m.module].tensor("rows").sum()) for m in of_type) / len(of_type)
        # Without any gradient, all layers are alike.
        return WeightGradient(rows=rows.to(device), sensitivity=math.sqrt(here / everywhere) if everywhere else 1.0)


def check_gatherable(model: LoadedModel, data: CalibrationData, needs: Mapping[str, Set[Statistic]]) -> None:
    """ConfigError if a strategy (name -> what it needs) asks for loss gradients of a model that has no loss, or probes
    a model that gives no hidden states.

    ModelError if it has one, but its tokenizer lacks what that takes. Asked before any work.
    """
    if asking := [name for name, statistics in needs.items() if statistics & WITH_LOSS]:
        check_has_logits(model, f"{' and '.join(asking)}, made from gradients of the loss,")
        feeder(model, data.windows.feeding).examples(data.windows.ids[:1])
    if any(statistics & PROBED for statistics in needs.values()):
        check_probes(model, data, feeder(model, data.windows.feeding))


def statistics_key(model: LoadedModel, data: CalibrationData) -> str:
    """Hash of what the statistics depend on. The batch size and the number of
    processes change the order of summation, hence the last bits."""
    # Models that predict the next token ignore how others are fed.
    feeding = None if model.task is Task.CAUSAL_LM else asdict(data.windows.feeding)
    return content_key(
        model=model.fingerprint,
        task=model.task,
        device=model.device.type,
        windows=data.windows.provenance["sha256"],
        feeding=feeding,
        batch_size=data.batch_size,
        **({"processes": processes.count()} if processes.count() > 1 else {}),
        **({"towards": data.towards.fingerprint} if data.towards is not None else {}),
    )


def gram_dtype(cache: Cache, architecture: Architecture) -> torch.dtype:
    """That in which the cache stores the Grams of a model, of which every number is stored once."""
    sites = {m.input_site: m.d_in for m in architecture.matrices}
    sizes = [*sites.values(), *(m.d_out for m in architecture.matrices)]
    return cache.stored_dtype(sum(size * (size + 1) // 2 for size in sizes))


def calibrate(
    model: LoadedModel,
    data: CalibrationData,
    *,
    needs: Set[Statistic],
    workspace: Workspace,
) -> CalibrationStats:
    """The needed statistics of a model on its calibration windows; from the cache where it has all of them."""
    key, cache = statistics_key(model, data), workspace.cache
    dtype = gram_dtype(cache, model.architecture)
    keys: dict[Statistic, Mapping[str, str]] = {}
    entries: dict[Statistic, dict[str, Entry]] = {}
    missing: dict[Statistic, set[int]] = {}  # layers by statistic
    for statistic in sorted(needs & OF_MATRICES):
        layers = {s.name: s.layer for s in subjects(model.architecture, ACCUMULATORS[statistic].place)}
        names = sorted(layers)
        # Rounded Grams are others; what else there is, is not rounded.
        stored = {} if dtype is torch.float64 or statistic not in _GRAMS else {"dtype": str(dtype)}
        probes = {"probes": asdict(data.probes)} if statistic in PROBED else {}
        keys[statistic] = {name: content_key(statistics=key, name=name, **stored, **probes) for name in names}
        found = {name: cache.find(statistic, name_key) for name, name_key in keys[statistic].items()}
        entries[statistic] = {name: entry for name, entry in found.items() if entry is not None}
        if absent := {layers[name] for name in names if name not in entries[statistic]}:
            missing[statistic] = absent
    missing = processes.from_first(lambda: missing)
    # An earlier walk that was interrupted left the statistics of the blocks that it finished.
    for absent_layers, statistics in _together(missing):
        gathered = gather(
            model, data, statistics, progress=workspace.progress, folder=cache.folder, layers=absent_layers, key=key
        )
        for statistic, name, tensors in gathered:
            if name not in entries[statistic] and processes.is_first():
                if statistic in _GRAMS:
                    tensors = {**tensors, "gram": pack_symmetric(tensors["gram"], dtype)}
                entries[statistic][name] = cache.store(statistic, keys[statistic][name], tensors)
    if missing and processes.count() > 1:
        processes.wait()
        for kind, found_keys in keys.items():
            entries[kind] = {name: cache.look_again(kind, name_key) for name, name_key in found_keys.items()}
    routed = [m for m in model.architecture.matrices if m.expert is not None]
    for note in told_of({m: _tokens(entries, m) for m in routed}):
        if note not in workspace.progress.notes:  # said once, whatever else is gathered
            workspace.progress.note(note)
    count, length = data.windows.ids.shape
    feed = feeder(model, data.windows.feeding)
    return CalibrationStats(
        architecture=model.architecture,
        tokens=data.windows.ids.numel(),
        predictions=count * feed.predictions(length),
        outputs=outputs_of(data, feed),
        entries=entries,
    )


def _tokens(entries: Mapping[Statistic, Mapping[str, Entry]], matrix: WeightMatrix) -> int:
    """How many tokens an expert's matrix read, as far as the statistics tell: at least as many as it wants, if they
    tell no more than that some came, or nothing at all."""
    if grams := entries.get(Statistic.GRAM):
        return int(grams[matrix.input_site].tensor("tokens"))
    any_came = True
    if moments := entries.get(Statistic.INPUT_MOMENTS):
        any_came = bool(moments[matrix.input_site].tensor("peak").any())
    elif gradients := entries.get(Statistic.WEIGHT_GRADIENT):
        any_came = bool(gradients[matrix.module].tensor("rows").any())
    return wanted_tokens(matrix) if any_came else 0


def _together(missing: Mapping[Statistic, set[int]]) -> Iterator[tuple[frozenset[int], set[Statistic]]]:
    """Statistics that one walk can gather: those that lack the same layers."""
    found: dict[frozenset[int], set[Statistic]] = {}
    for statistic, layers in missing.items():
        found.setdefault(frozenset(layers), set()).add(statistic)
    yield from found.items()


def _gram(entry: Entry) -> Tensor:
    return unpack_symmetric(entry.tensor("gram"))


def _read_moments(entry: Entry) -> InputMoments:
    return InputMoments(*(entry.tensor(name) for name in ("absolute", "peak", "fourth")))


def _moments(sites: Sequence[InputMoments], device: torch.device) -> InputMoments:
    absolute, peak, fourth = (
        torch.stack([getattr(site, name) for site in sites]).to(device) for name in ("absolute", "peak", "fourth")
    )
    return InputMoments(absolute=absolute.mean(0), peak=peak.amax(0), fourth=fourth.mean(0))


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    total, *others = tensors
    for other in others:
        total = total + other
    return total
