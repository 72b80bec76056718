"""Architectures without a model, and measures that are given instead of gathered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bs_exp.layout.plain import PlainLayout
from bs_exp.linalg.cholesky import cholesky_whitener
from bs_exp.linalg.decomposition import spectrum_of
from bs_exp.protocols import Layout, Measures, SharingProblem
from bs_exp.types import Architecture, GroupStatistics, LossUnit, Metric, Spectrum, WeightGroup, WeightMatrix


def architecture(layers: int = 5, **shapes: tuple[int, int]) -> Architecture:
    shapes = shapes or {"q": (8, 8), "k": (8, 4), "down": (20, 8)}
    matrices = tuple(
        WeightMatrix(matrix, layer, "site", f"layers.{layer}.{matrix}", d_in, d_out)
        for layer in range(layers)
        for matrix, (d_in, d_out) in shapes.items()
    )
    return Architecture(family="test", matrices=matrices)


@dataclass(frozen=True, eq=False)
class GivenMeasures:
    """Weights and Grams by (matrix type, layer)."""

    weights: Mapping[tuple[str, int], Tensor]
    grams: Mapping[tuple[str, int], Tensor]
    unit: LossUnit = LossUnit.OUTPUT_NORM
    asked: list[WeightGroup] = field(default_factory=list)

    def weight(self, group: WeightGroup) -> Tensor:
        return torch.cat([self.weights[group.matrix, layer] for layer in group.layers], dim=1)

    def statistics(self, group: WeightGroup) -> GroupStatistics:
        gram = torch.stack([self.grams[group.matrix, layer] for layer in group.layers]).sum(0)
        return GroupStatistics(group=group, tokens=1, gram=gram)

    def metric(self, group: WeightGroup) -> Metric:
        gram = self.statistics(group).gram
        assert gram is not None
        if self.unit.is_second_order:  # of a token of one layer, as in the two-sided metric
            gram = gram / group.size
        return Metric(whitener=cholesky_whitener(gram)[0], unit=self.unit)

    def spectrum(self, group: WeightGroup) -> Spectrum:
        self.asked.append(group)
        return spectrum_of(group, self.weight(group), self.metric(group))

    def track(self, groups: Sequence[WeightGroup], label: str) -> Iterator[WeightGroup]:
        return iter(groups)


def random_measures(model: Architecture, seed: int = 0, unit: LossUnit = LossUnit.OUTPUT_NORM) -> GivenMeasures:
    """Weights of falling spectra and correlated inputs; the even layers of a type are alike, and so are the odd."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights, grams = {}, {}
    for matrix in model.matrix_types:
        common = [normal(model.of_type(matrix)[0].d_in, 2) for _ in range(2)]
        for m in model.of_type(matrix):
            own = normal(m.d_in, m.d_out)
            weights[matrix, m.place] = 3.0 * common[m.place % 2] @ normal(2, m.d_out) + 0.5 * own
            inputs = normal(4 * m.d_in, m.d_in) @ normal(m.d_in, m.d_in)
            grams[matrix, m.place] = inputs.mT @ inputs
    return GivenMeasures(weights, grams, unit)


def problem(
    architecture: Architecture, measures: Measures | None = None, ratio: float = 0.5, layout: Layout | None = None
) -> SharingProblem:
    return SharingProblem(architecture, retain_ratio=ratio, layout=layout or PlainLayout(), measures=measures)
