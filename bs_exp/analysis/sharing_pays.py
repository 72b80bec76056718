"""For which pairs of layers does one basis lose less than two?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from bs_exp.errors import ConfigError, RecordError
from bs_exp.files import write_file
from bs_exp.protocols import SharingProblem
from bs_exp.rank_budget import rank_at
from bs_exp.records.pairs import PAIRS_FILE, pair_table, pairs_document
from bs_exp.reporting.figures import pair_figures
from bs_exp.types import MATRIX_TYPES, Architecture, WeightGroup, WeightMatrix
from bs_exp.validation import check_at_least, check_choice

FORMATS = ("svg", "png")


@dataclass(frozen=True, kw_only=True)
class SharingPays:
    """A table per matrix type: for every pair of layers, the joint loss and the sum of the two separate losses.

    Every loss is taken at `retain_ratio` of the parameters in question, so at the same stored parameters, in the run's
    metric; norms are added, not their squares. `matrices` None takes all types; `max_gap` is how many layers apart a
    pair may be, None for any.
    Written as JSON (joint, separate, their difference and ratio) and as heat maps. Only eigenvalues are computed.
    Basis Sharing (2410.03765), Figure 4 and appendix.
    """

    matrices: tuple[str, ...] | None
    max_gap: int | None
    figures: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrices", None if self.matrices is None else tuple(self.matrices))
        object.__setattr__(self, "figures", tuple(self.figures))
        check_at_least(1, max_gap=self.max_gap)
        for kind in self.figures:
            check_choice("figures", kind, FORMATS)

    def check(self, architecture: Architecture) -> None:
        """ConfigError unless the named matrix types exist, and the model has at least one of them."""
        if self.matrices is None:
            return
        unknown = [matrix for matrix in self.matrices if matrix not in MATRIX_TYPES]
        if unknown or not set(self.matrices) & set(architecture.matrix_types):
            raise ConfigError(
                f"analysis.matrices must name matrix types of this model ({', '.join(architecture.matrix_types)}), or "
                f"be null for all, got {list(self.matrices)}."
            )

    def save(self, problem: SharingProblem, folder: Path) -> tuple[Path, ...]:
        """Writes the table and its figures, and returns their paths; RecordError if the folder cannot be written."""
        tables = self.tables(problem)
        drawn = pair_figures([pair_table(table, folder) for table in tables]) if self.figures else []
        contents: dict[str, bytes] = {PAIRS_FILE: pairs_document(_facts(problem), tables).encode()}
        for number, figure in enumerate(drawn, start=1):
            name = Path(PAIRS_FILE).stem + (f"-{number}" if len(drawn) > 1 else "")
            files = {"svg": figure.svg.encode(), "png": figure.png}
            contents |= {f"{name}.{kind}": files[kind] for kind in self.figures}
        try:
            for name, data in contents.items():
                write_file(folder / name, data)
        except OSError as error:
            raise RecordError(f"Cannot write into {folder}: {error}. Free some space, or set hydra.run.dir.") from error
        return tuple(folder / name for name in contents)

    def tables(self, problem: SharingProblem) -> list[dict[str, Any]]:
        """One table, as plain data for JSON, for each matrix type with at least two layers of one shape.

        Experts are left out: they share within a layer.
        """
        return [
            table
            for matrix in problem.architecture.matrix_types
            if self.matrices is None or matrix in self.matrices
            if (table := self._table(matrix, problem)) is not None
        ]

    def _table(self, matrix: str, problem: SharingProblem) -> dict[str, Any] | None:
        members = [m for m in problem.architecture.of_type(matrix) if m.expert is None]
        pairs = [
            _group(pair)
            for pair in combinations(members, 2)
            if len({(m.d_in, m.d_out, m.stack) for m in pair}) == 1
            and (self.max_gap is None or pair[1].layer - pair[0].layer <= self.max_gap)
        ]
        if not pairs:
            return None
        assert problem.measures is not None
        losses, unit = {}, ""
        for group in problem.measures.track([*(_group([m]) for m in members), *pairs], f"comparing {matrix}"):
            spectrum = problem.measures.spectrum(group)
            losses[group.layers] = spectrum.loss(rank_at(group, problem.retain_ratio, problem.layout))
            unit = spectrum.unit.value
        layers = [m.layer for m in members]
        return {
            "matrix": matrix,
            "layers": layers,
            "unit": unit,
            "apart": [losses[(layer,)] for layer in layers],
            "pairs": [_pair(group, losses) for group in pairs],
        }


def _group(members: Sequence[WeightMatrix]) -> WeightGroup:
    first = members[0]
    return WeightGroup(first.matrix, tuple(m.layer for m in members), first.d_in, first.d_out)


def _pair(group: WeightGroup, losses: Mapping[tuple[int, ...], float]) -> dict[str, Any]:
    joint, separate = losses[group.layers], sum(losses[(layer,)] for layer in group.layers)
    return {
        "layers": list(group.layers),
        "joint": joint,
        "separate": separate,
        "difference": joint - separate,
        "ratio": joint / separate if separate > 0.0 else None,
    }


def _facts(problem: SharingProblem) -> dict[str, Any]:
    return {
        "what": "loss of one shared basis (joint) against one basis each (separate), at the same stored parameters",
        "retain_ratio": problem.retain_ratio,
        "layout": problem.layout.name,
    }
