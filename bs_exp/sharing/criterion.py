"""Neighbouring layers share a basis where their joint loss is not above the sum of their separate losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bs_exp.errors import ConfigError
from bs_exp.linalg.decomposition import decompose, spectrum_of, truncate
from bs_exp.protocols import Measures, SharingProblem
from bs_exp.rank_budget import rank_at
from bs_exp.sharing.layers import check_matrices, check_named, part, runs
from bs_exp.types import Architecture, Metric, Statistic, WeightGroup
from bs_exp.validation import check_at_least, check_choice, check_names

NORMS = ("frobenius", "whitened", "output")


@dataclass(frozen=True, kw_only=True)
class CriterionSharing:
    """Greedy groups from layer 0: the next layer joins if the joint loss is at most the sum of both separate losses.

    The separate losses are those of the group so far and of the layer. Every loss is taken at `retain_ratio` of the
    parameters in question, so both sides store equally many. A group has at most `max_size` layers.
    `norm` selects the loss: `frobenius`, the norm of the error in the weights; `whitened`, the norm in the run's own
    metric; `output`, the squared error of the outputs on the calibration inputs, `sum_i tr(dW_i^T H_i dW_i)` with H_i
    the Gram of layer i alone, for factors made in the run's metric. With `squared`, squares of the norms are added; the
    square of a group is then divided by the number of layers whose statistics its metric adds up. Losses in nats
    (whitening=two_sided) are added as they are.
    Basis Sharing (2410.03765), Figure 4, compares the joint norm with the sum of two; whether squared is not stated.
    """

    matrices: tuple[str, ...]
    norm: str
    squared: bool
    max_size: int

    measured: ClassVar[bool] = True
    in_nats: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrices", check_names("matrices", self.matrices))
        check_named(self.matrices)
        check_choice("norm", self.norm, NORMS)
        check_at_least(1, max_size=self.max_size)

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Statistic.GRAM} if self.norm == "output" else ())

    def check(self, architecture: Architecture) -> None:
        """ConfigError if no listed type occurs in the model."""
        check_matrices(self.matrices, architecture)

    def groups(self, problem: SharingProblem) -> tuple[WeightGroup, ...]:
        """All groups, ordered by matrix type and layer; raises what `check` raises."""
        architecture = problem.architecture
        self.check(architecture)
        found: list[WeightGroup] = []
        for matrix in architecture.matrix_types:
            for run in runs(architecture, matrix):
                singles = [part(run, (layer,)) for layer in run.layers]
                found += self._grown(singles, problem) if matrix in self.matrices else singles
        return tuple(found)

    def _grown(self, singles: list[WeightGroup], problem: SharingProblem) -> list[WeightGroup]:
        assert problem.measures is not None
        closed: list[WeightGroup] = []
        current, loss = None, 0.0
        for single in problem.measures.track(singles, f"comparing {singles[0].matrix}"):
            apart = self._loss(single, problem)
            if current is not None and current.size < self.max_size:
                joined = part(current, (*current.layers, *single.layers))
                together = self._loss(joined, problem)
                if together <= loss + apart:
                    current, loss = joined, together
                    continue
            closed += [] if current is None else [current]
            current, loss = single, apart
        return closed if current is None else [*closed, current]

    def _loss(self, group: WeightGroup, problem: SharingProblem) -> float:
        assert problem.measures is not None
        rank, measures = rank_at(group, problem.retain_ratio, problem.layout), problem.measures
        if self.norm == "output":
            return _output_error(group, rank, measures)
        if self.norm == "frobenius":
            found, sums = spectrum_of(group, measures.weight(group), Metric(whitener=None)), 1
        else:
            found, sums = measures.spectrum(group), _sums(group, measures)
        loss = found.loss(rank)
        return loss**2 / sums if self.squared and not found.unit.is_second_order else loss


def _sums(group: WeightGroup, measures: Measures) -> int:
    """The number of layers whose statistics the group's metric adds up: squared losses are too large by this factor."""
    statistics = measures.statistics(group)
    return group.size if statistics.gram is not None or statistics.weight_gradient is not None else 1


def _output_error(group: WeightGroup, rank: int | None, measures: Measures) -> float:
    """`sum_i tr(dW_i^T H_i dW_i)` for the run's factors of a rank, with H_i the Gram of layer i's own inputs.

    A rank of None (dense) loses 0. Raises ConfigError if the Grams were not gathered.
    """
    if rank is None or rank >= group.full_rank:
        return 0.0
    weight = measures.weight(group)
    lost = dict(zip(group.layers, weight.split(group.d_out, dim=1), strict=True))
    if rank > 0:
        factors = truncate(decompose(group, weight, measures.metric(group)), rank)
        lost = {layer: block - factors.basis @ factors.coefficients[layer] for layer, block in lost.items()}
    total = 0.0
    for layer, block in lost.items():
        gram = measures.statistics(part(group, (layer,))).gram
        if gram is None:
            raise ConfigError("sharing.norm=output needs the Gram of the inputs, which was not gathered.")
        total += float((block * (gram @ block)).sum())
    return total
