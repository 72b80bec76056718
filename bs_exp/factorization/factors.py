"""The decompositions of all groups of a model: computed once, cached, and read up to the ranks of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from bs_exp.cache import Entry
from bs_exp.errors import DecompositionError
from bs_exp.factorization.spectra import GroupMeasures, LinAlgError, read_spectrum, spectrum_tensors
from bs_exp.linalg.corrections import corrections_of
from bs_exp.linalg.decomposition import decompose, split_by_layer
from bs_exp.records.stages import Stage
from bs_exp.types import Corrections, RankPlan, SharedFactors, Spectrum, WeightGroup

KIND = "decomposition"


@dataclass(frozen=True, eq=False)
class Decompositions:
    """One cache entry per group. Spectra are small and read at once, factors group by group and up to their rank."""

    entries: Mapping[WeightGroup, Entry]
    measures: GroupMeasures

    @property
    def spectra(self) -> tuple[Spectrum, ...]:
        """All spectra, in the order of the groups."""
        return tuple(read_spectrum(group, entry) for group, entry in self.entries.items())

    def truncated(self, plan: RankPlan) -> Iterator[SharedFactors]:
        """The factors of a plan, one group at a time; groups that stay dense are left out."""
        for planned in plan.groups:
            if planned.rank is not None:
                entry = self.entries[planned.group]
                shared = split_by_layer(
                    planned.group, entry.rows("basis_t", planned.rank), entry.rows("coefficients", planned.rank)
                )
                yield replace(shared, corrections=self._corrections(planned.group, entry, planned.rank))

    def _corrections(self, group: WeightGroup, entry: Entry, rank: int) -> Corrections:
        if not group.correction:
            return {}
        metric = self.measures.metric(group)
        device = self.measures.dense.device
        basis_t, coefficients = (entry.tensor(name).to(device) for name in ("basis_t", "coefficients"))
        return corrections_of(group, basis_t, coefficients, metric, rank)


def decompose_groups(groups: Iterable[WeightGroup], measures: GroupMeasures) -> Decompositions:
    """The decompositions of groups, from the cache where it has them; the others are made one at a time and stored.

    Statistics are gathered only if some decomposition is missing.
    Raises DecompositionError, with the group's name, if its weights or its Gram cannot be factorised.
    """
    cache, progress = measures.workspace.cache, measures.workspace.progress
    keys = {group: measures.key(group) for group in groups}
    entries = {group: cache.find(KIND, key) for group, key in keys.items()}
    missing = [group for group, entry in entries.items() if entry is None]
    if missing:
        measures.gather()
    with progress.stage(Stage.DECOMPOSE):
        for group in progress.track(missing, label="decomposing", total=len(missing)):
            try:
                found = decompose(group, measures.weight(group), measures.metric(group))
            except (DecompositionError, LinAlgError) as error:
                raise measures.failure(group, error) from error
            factors = {"basis_t": found.basis_t.cpu(), "coefficients": found.coefficients.cpu()}
            entries[group] = cache.store(KIND, keys[group], factors | spectrum_tensors(found.spectrum))
    if count := len(keys) - len(missing):
        progress.note(f"{count} of {len(keys)} decompositions came from the cache")
    return Decompositions({group: entry for group, entry in entries.items() if entry is not None}, measures)
