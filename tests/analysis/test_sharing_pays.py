"""Joint against separate losses for every pair: the numbers, the files, and a run that saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bs_exp.analysis.sharing_pays import SharingPays
from bs_exp.errors import ConfigError, RecordError
from bs_exp.layout.plain import PlainLayout
from bs_exp.linalg.cholesky import cholesky_whitener
from bs_exp.linalg.decomposition import spectrum_of
from bs_exp.protocols import SharingProblem
from bs_exp.records.record import read_record
from bs_exp.reporting.collect import collect
from bs_exp.types import Architecture, GroupStatistics, LossUnit, Metric, Spectrum, WeightGroup, WeightMatrix

LAYERS, RATIO = 4, 0.6
SHAPES = {"q": (10, 14), "down": (14, 10)}


class Given:
    """Random weights; layers 0 and 2 are equal. The Gram of every layer is the same."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = {
            (matrix, layer): torch.randn(*shape, generator=generator, dtype=torch.float64)
            for matrix, shape in SHAPES.items()
            for layer in range(LAYERS)
        }
        self.weights["q", 2] = self.weights["q", 0]
        self.grams = {}
        for matrix, (d_in, _) in SHAPES.items():
            inputs = torch.randn(30, d_in, generator=generator, dtype=torch.float64)
            self.grams[matrix] = inputs.mT @ inputs

    def weight(self, group: WeightGroup) -> torch.Tensor:
        return torch.cat([self.weights[group.matrix, layer] for layer in group.layers], dim=1)

    def statistics(self, group: WeightGroup) -> GroupStatistics:
        return GroupStatistics(group=group, tokens=30, gram=group.size * self.grams[group.matrix])

    def metric(self, group: WeightGroup) -> Metric:
        whitener, _ = cholesky_whitener(group.size * self.grams[group.matrix])
        return Metric(whitener=whitener, unit=LossUnit.OUTPUT_NORM)

    def spectrum(self, group: WeightGroup) -> Spectrum:
        return spectrum_of(group, self.weight(group), self.metric(group))

    def track(self, groups: Any, label: str) -> Any:
        return iter(groups)


@pytest.fixture
def problem() -> SharingProblem:
    matrices = tuple(
        WeightMatrix(matrix, layer, "site", f"{layer}.{matrix}", *shape)
        for layer in range(LAYERS)
        for matrix, shape in SHAPES.items()
    )
    return SharingProblem(Architecture("test", matrices), RATIO, PlainLayout(), Given())  # type: ignore[arg-type]


def analysis(**settings: Any) -> SharingPays:
    return SharingPays(**{"matrices": None, "max_gap": None, "figures": (), **settings})


def loss(given: Given, matrix: str, layers: tuple[int, ...]) -> float:
    """Norm of the discarded singular values of `S W`, with torch's SVD and the papers' rank."""
    weight = torch.cat([given.weights[matrix, layer] for layer in layers], dim=1)
    d_in, columns = weight.shape
    rank = int(RATIO * d_in * columns / (d_in + columns))
    whitener = torch.linalg.cholesky(len(layers) * given.grams[matrix]).mT
    return float(torch.linalg.svdvals(whitener @ weight)[rank:].norm())


def test_every_pair_of_every_type_from_the_formulas(problem: SharingProblem, tmp_path: Path) -> None:
    given: Any = problem.measures
    analysis().save(problem, tmp_path)
    data = json.loads((tmp_path / "sharing_pays.json").read_text())
    assert (data["retain_ratio"], data["layout"], data["unit"]) == (RATIO, "plain", "output_norm")
    assert [table["matrix"] for table in data["tables"]] == ["q", "down"]
    for table in data["tables"]:
        assert table["layers"] == [0, 1, 2, 3] and len(table["pairs"]) == 6
        for pair in table["pairs"]:
            a, b = pair["layers"]
            joint = loss(given, table["matrix"], (a, b))
            separate = loss(given, table["matrix"], (a,)) + loss(given, table["matrix"], (b,))
            assert pair["joint"] == pytest.approx(joint, rel=1e-6)
            assert pair["separate"] == pytest.approx(separate, rel=1e-6)
            assert pair["ratio"] == pytest.approx(joint / separate, rel=1e-6)
            assert (
                table["values"][a][b] == table["values"][b][a] == pair["difference"] == pair["joint"] - pair["separate"]
            )
        assert all(table["values"][i][i] is None for i in range(4))
    ratios = {tuple(pair["layers"]): pair["ratio"] for pair in data["tables"][0]["pairs"]}
    assert min(ratios, key=ratios.__getitem__) == (0, 2) and ratios[0, 2] < 1


def test_types_and_gaps_can_be_chosen(problem: SharingProblem) -> None:
    (table,) = analysis(matrices=("down",), max_gap=1).tables(problem)
    assert table["matrix"] == "down"
    assert [pair["layers"] for pair in table["pairs"]] == [[0, 1], [1, 2], [2, 3]]


def test_nothing_lost_has_no_ratio(problem: SharingProblem) -> None:
    whole = SharingProblem(problem.architecture, 1.0, problem.layout, problem.measures)
    assert all(p["ratio"] is None and p["joint"] == 0.0 for table in analysis().tables(whole) for p in table["pairs"])


def test_figures_are_those_that_were_asked_for(problem: SharingProblem, tmp_path: Path) -> None:
    paths = analysis(figures=("svg",)).save(problem, tmp_path)
    assert sorted(path.name for path in paths) == ["sharing_pays.json", "sharing_pays.svg"]
    assert (tmp_path / "sharing_pays.svg").read_text().lstrip().startswith("<")
    with pytest.raises(RecordError, match="Cannot write into"):
        analysis().save(problem, tmp_path / "absent")


def test_settings() -> None:
    with pytest.raises(ConfigError, match="figures must be one of svg, png, got 'gif'"):
        analysis(figures=("gif",))
    with pytest.raises(ConfigError, match="max_gap must be a whole number of at least 1, got 0"):
        analysis(max_gap=0)
    model = Architecture("test", (WeightMatrix("q", 0, "site", "q", 4, 4),))
    for wrong in ("gaet", "up"):
        with pytest.raises(ConfigError, match=rf"analysis\.matrices must name matrix types .*\(q\).*got \['{wrong}'\]"):
            analysis(matrices=(wrong,)).check(model)
    analysis(matrices=("q", "up")).check(model)


def test_a_run_saves_the_table_and_a_report_finds_it(
    cli: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path
) -> None:
    done = cli(*tiny, "analysis=sharing_pays", "analysis.figures=[]", "hydra.run.dir=out")
    assert done.status == 0, done.err
    record = read_record(tmp_path / "out")
    assert "analysis: sharing_pays.json" in record.notes
    pairs = collect([tmp_path / "out"]).pairs
    assert {table.matrix for table in pairs} == {"q", "k", "v", "o", "gate", "up", "down"}
    assert all(table.layers == (0, 1, 2) and table.unit == "output_norm" for table in pairs)


def test_a_type_that_the_model_lacks_fails_before_the_dense_evaluation(
    cli: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path
) -> None:
    done = cli(*tiny, "analysis=sharing_pays", "analysis.matrices=[gaet]", "hydra.run.dir=out")
    assert done.status == 1 and "analysis.matrices must name matrix types of this model" in done.err
    assert not read_record(tmp_path / "out").metrics
