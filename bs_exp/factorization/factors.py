"""The decompositions of all groups of a model: computed once, cached, and read up to the ranks of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from bs_exp import processes
from bs_exp.cache import Entry
from bs_exp.errors import CacheError
from bs_exp.factorization.spectra import GroupMeasures, read_spectrum, spectrum_tensors
from bs_exp.linalg.corrections import corrections_of
from bs_exp.linalg.decomposition import decompose, split_by_layer
from bs_exp.protocols import Layout
from bs_exp.rank_budget import largest_rank
from bs_exp.records.stages import Stage
from bs_exp.types import Corrections, RankPlan, SharedFactors, Spectrum, Statistic, WeightGroup

KIND = "decomposition"


@dataclass(frozen=True, eq=False)
class Decompositions:
    """One cache entry per group. Spectra are small and read at once, factors group by group and up to their rank.

    An entry holds the leading components; of a group that a plan wants more of, all are computed again.
    """

    entries: Mapping[WeightGroup, Entry]
    measures: GroupMeasures

    @cached_property
    def spectra(self) -> tuple[Spectrum, ...]:
        """All spectra, in the order of the groups; with first-order changes of the loss where its gradient is known."""
        spectra = (read_spectrum(group, entry) for group, entry in self.entries.items())
        if Statistic.LOSS_GRADIENT not in self.measures.needs:
            return tuple(spectra)
        return tuple(replace(spectrum, first_order=self._first_order(spectrum.group)) for spectrum in spectra)

    def truncated(self, plan: RankPlan) -> Iterator[SharedFactors]:
        """The factors of a plan in fp64, one group at a time; groups that stay dense are left out."""
        for planned in plan.groups:
            if planned.rank is not None:
                entry = self.entries[planned.group]
                if entry.length("basis_t") < planned.rank:
                    entry = _decomposed(planned.group, self.measures, planned.group.full_rank)
                basis_t, coefficients = (
                    entry.rows(name, planned.rank).double() for name in ("basis_t", "coefficients")
                )
                shared = split_by_layer(planned.group, basis_t, coefficients)
                yield replace(shared, corrections=self._corrections(planned.group, entry, planned.rank))

    def _first_order(self, group: WeightGroup) -> Tensor:
        """`-b_i^T G c_i`: the change of the loss, to first order, without component i, `b_i c_i`; G is its gradient."""
        gradient = self.measures.statistics(group).loss_gradient
        assert gradient is not None
        entry = self.entries[group]
        basis_t, coefficients = (
            entry.tensor(name).to(gradient.device).double() for name in ("basis_t", "coefficients")
        )
        change: Tensor = -torch.linalg.vecdot(basis_t @ gradient, coefficients)
        return change.cpu()

    def _corrections(self, group: WeightGroup, entry: Entry, rank: int) -> Corrections:
        if not group.correction:
            return {}
        metric = self.measures.metric(group)
        device = self.measures.dense.device
        basis_t, coefficients = (entry.tensor(name).to(device).double() for name in ("basis_t", "coefficients"))
        return corrections_of(group, basis_t, coefficients, metric, rank)


def decompose_groups(
    groups: Iterable[WeightGroup], measures: GroupMeasures, layout: Layout | None = None
) -> Decompositions:
    """The decompositions of groups, from the cache where it has them; the others are made one at a time and stored.

    Stored are the components that a plan can ask for: with a `layout`, those of ranks that cost less than the dense
    group, and all if the measures have the loss's gradient, whose share in every component is then asked for.
    Statistics are gathered only if some decomposition is missing.
    Raises DecompositionError, with the group's name, if its weights or its Gram cannot be factorised.
    """
    progress = measures.workspace.progress
    if Statistic.LOSS_GRADIENT in measures.needs:
        layout = None
    ranks = {group: stored_rank(group, layout) for group in groups}
    entries = {group: _stored(group, measures, rank) for group, rank in ranks.items()}
    # What other runs store or remove meanwhile may be there for one of the processes alone.
    absent = processes.anywhere([entry is None for entry in entries.values()])
    missing = [group for group, gone in zip(entries, absent, strict=True) if gone]
    if missing or processes.count() > 1:  # what only the first process asks for later is there then
        measures.gather()
    with progress.stage(Stage.DECOMPOSE):
        failed: Exception | None = None
        try:
            for group in progress.track(own := processes.mine(missing), label="decomposing", total=len(own)):
                entries[group] = _decomposed(group, measures, ranks[group])
        except Exception as error:  # whatever it is: the others wait here
            failed = error
        processes.raise_together(failed)
        if processes.count() > 1:
            entries |= {group: measures.workspace.cache.look_again(KIND, measures.key(group)) for group in missing}
    if count := len(entries) - len(missing):
        progress.note(f"{count} of {len(entries)} decompositions came from the cache")
    return Decompositions({group: _there(group, entry) for group, entry in entries.items()}, measures)


def _there(group: WeightGroup, entry: Entry | None) -> Entry:
    if entry is None:
        raise CacheError(
            f"the decomposition of {group.name} was made by another process and is not in the cache: is cache.dir a "
            "folder that all processes share, and did nobody remove files from it? Start the same command again."
        )
    return entry


def stored_rank(group: WeightGroup, layout: Layout | None) -> int:
    """How many components are stored: up to the largest rank that costs less than the dense group in the layout; all
    without one, and where corrections are made of the components."""
    if layout is None or group.correction:
        return group.full_rank
    return max(1, largest_rank(group, group.parameters - 1, layout))


def _stored(group: WeightGroup, measures: GroupMeasures, rank: int) -> Entry | None:
    """The entry of a decomposition in the cache, if it has so many components."""
    entry = measures.workspace.cache.find(KIND, measures.key(group))
    return entry if entry is not None and entry.length("basis_t") >= rank else None


def _decomposed(group: WeightGroup, measures: GroupMeasures, rank: int) -> Entry:
    """The decomposition of a group, made now; its leading components are stored."""
    found = measures.made(decompose, group)
    factors = {
        name: rows[:rank].to(device="cpu", dtype=measures.factor_dtype)
        for name, rows in (("basis_t", found.basis_t), ("coefficients", found.coefficients))
    }
    cache = measures.workspace.cache
    return cache.store(KIND, measures.key(group), factors | spectrum_tensors(found.spectrum))
