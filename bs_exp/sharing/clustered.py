"""Groups of layers whose matrices have similar leading left singular subspaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bs_exp.errors import ConfigError
from bs_exp.linalg.clustering import LINKAGES, Bounds, agglomerate
from bs_exp.linalg.subspaces import left_subspace, subspace_distances
from bs_exp.protocols import Measures, SharingProblem
from bs_exp.sharing.layers import by_shape, check_matrices, check_named, check_size, part
from bs_exp.types import Architecture, Statistic, WeightGroup
from bs_exp.validation import check_at_least, check_choice, check_names, shown

SPACES = ("weight", "whitened")


@dataclass(frozen=True, kw_only=True)
class ClusteredSharing:
    """Agglomerative clusters of layers, by the distance between their matrices' leading left singular subspaces.

    The distance of two layers is `||U_a U_a^T - U_b U_b^T||_F / sqrt(2 t)` with U the first t left singular vectors of
    W (`space=weight`) or of `S W R` (`space=whitened`; S is made from all layers of the type, so that their subspaces
    have the same coordinates). `subspace` is t, or t as a share of `min(d_in, d_out)`.
    For each type in `matrices`, merging stops at `clusters` groups, or where no two clusters are within `max_distance`
    (0 to 1), or, with both None, where the sizes allow no more. Every group has `min_size` to `max_size` layers; they
    need not be neighbours, unless `adjacent_only` is set.
    Own method; the papers group adjacent layers only (Basis Sharing, 2410.03765, section 3.2).
    """

    matrices: tuple[str, ...]
    space: str
    subspace: int | float
    linkage: str
    clusters: int | None
    max_distance: float | None
    min_size: int
    max_size: int | None
    adjacent_only: bool

    measured: ClassVar[bool] = True
    in_nats: ClassVar[bool] = False
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrices", check_names("matrices", self.matrices))
        check_named(self.matrices)
        check_choice("space", self.space, SPACES)
        check_choice("linkage", self.linkage, tuple(LINKAGES))
        check_at_least(1, clusters=self.clusters, min_size=self.min_size, max_size=self.max_size)
        is_share = isinstance(self.subspace, float) and 0.0 < self.subspace < 1.0
        is_number = isinstance(self.subspace, int) and not isinstance(self.subspace, bool) and self.subspace >= 1
        if not is_share and not is_number:
            raise ConfigError(
                "subspace must be a whole number of directions, at least 1, or a share of them between 0 and 1, got "
                f"{shown(self.subspace)}."
            )
        if self.max_distance is not None and not 0.0 <= self.max_distance <= 1.0:
            raise ConfigError(f"max_distance must be between 0 and 1, or null, got {self.max_distance}.")
        if self.clusters is not None and self.max_distance is not None:
            raise ConfigError(
                f"clusters is {self.clusters} and max_distance is {self.max_distance}: only one of them can say how "
                "far merging goes; set the other one to null."
            )
        if self.max_size is not None and self.max_size < self.min_size:
            raise ConfigError(f"max_size must be at least min_size ({self.min_size}), got {self.max_size}.")

    def check(self, architecture: Architecture) -> None:
        """ConfigError if the layers cannot form groups of such sizes, or `subspace` is the whole space of a matrix."""
        check_matrices(self.matrices, architecture)
        check_size("min_size", self.min_size, architecture)
        for matrix in self._types(architecture):
            for whole in by_shape(architecture, matrix):
                if self.clusters is not None and self.clusters > whole.size:
                    raise ConfigError(
                        f"sharing.clusters must be at most {whole.size}, the layers of {matrix} ({whole.d_in} x "
                        f"{whole.d_out}) to be put into groups, got {self.clusters}."
                    )
                if not self._bounds(whole).allow([1] * whole.size):
                    number = f"{self.clusters} groups" if self.clusters else "groups"
                    raise ConfigError(
                        f"sharing.min_size={self.min_size} and sharing.max_size={self.max_size} do not fit: "
                        f"{whole.size} layers of {matrix} cannot be put into {number} of such sizes. "
                        "Lower min_size, raise max_size, or change clusters."
                    )
                if self._dimension(whole) >= whole.d_in or self._dimension(whole) > whole.d_out:
                    raise ConfigError(
                        f"sharing.subspace must be below {min(whole.d_in, whole.d_out + 1)} for {matrix} "
                        f"({whole.d_in} x {whole.d_out}), got {self.subspace}: all directions are in it."
                    )

    def groups(self, problem: SharingProblem) -> tuple[WeightGroup, ...]:
        """All groups, ordered by matrix type and first layer; raises what `check` raises."""
        architecture = problem.architecture
        self.check(architecture)
        assert problem.measures is not None
        found = []
        for matrix in architecture.matrix_types:
            for whole in by_shape(architecture, matrix):
                if matrix in self.matrices:
                    found += self._clusters(whole, problem.measures)
                else:
                    found += [part(whole, (layer,)) for layer in whole.layers]
        return tuple(found)

    def _types(self, architecture: Architecture) -> list[str]:
        return [matrix for matrix in architecture.matrix_types if matrix in self.matrices]

    def _bounds(self, whole: WeightGroup) -> Bounds:
        return Bounds(
            min_size=self.min_size,
            max_size=whole.size if self.max_size is None else self.max_size,
            count=self.clusters,
            adjacent=self.adjacent_only,
        )

    def _dimension(self, whole: WeightGroup) -> int:
        if isinstance(self.subspace, int):
            return self.subspace
        return max(1, round(self.subspace * min(whole.d_in, whole.d_out)))

    def _clusters(self, whole: WeightGroup, measures: Measures) -> list[WeightGroup]:
        metric = measures.metric(whole) if self.space == "whitened" else None
        bases = []
        for single in measures.track([part(whole, (layer,)) for layer in whole.layers], f"subspaces of {whole.matrix}"):
            weight = measures.weight(single)
            if metric is not None and metric.right is not None:
                weight = weight @ metric.right[single.layers[0]]
            if metric is not None and metric.whitener is not None:
                weight = metric.whitener @ weight
            bases.append(left_subspace(weight, self._dimension(whole)))
        distances = subspace_distances(bases).numpy()
        clusters = agglomerate(distances, self._bounds(whole), linkage=self.linkage, threshold=self.max_distance)
        return [part(whole, (whole.layers[item] for item in cluster)) for cluster in clusters]
