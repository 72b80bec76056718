"""What the cache keeps of decompositions: the ranks that pay, rounded as it says, and no round longer than needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from bs_exp.allocation.water_filling import WaterFilling
from bs_exp.cache import Cache
from bs_exp.cache_folder import cache_files
from bs_exp.factorization.factors import KIND, Decompositions, decompose_groups
from bs_exp.factorization.spectra import GroupMeasures
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.linalg.decomposition import decompose
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress
from bs_exp.progress import Progress
from bs_exp.protocols import Layout
from bs_exp.schedule.steps import EqualSteps
from bs_exp.sharing.none import singles
from bs_exp.types import CalibrationData, Decomposition, LoadedModel, Metric, PlannedGroup, RankPlan, WeightGroup
from bs_exp.whitening.identity import IdentityWhitening
from bs_exp.workspace import Workspace
from tests.support.recipes import RECIPE

DENSE = tiny_random()
GROUPS = singles(DENSE.architecture)


def measures(cache: Cache) -> GroupMeasures:
    return GroupMeasures(
        dense=DENSE,
        current=DENSE,
        data=CalibrationData(RECIPE.calibration.windows(DENSE.tokenizer), RECIPE.calibration.batch_size),
        needs=RECIPE.metric_needs,
        whitening=RECIPE.whitening,
        importance=RECIPE.importance,
        workspace=Workspace(cache, Progress(quiet=True)),
    )


def products(found: Decompositions, rank: int) -> dict[WeightGroup, Tensor]:
    groups = tuple(PlannedGroup(g, min(rank, g.full_rank), g.parameters, 0.0, 0.0) for g in found.entries)
    truncated = found.truncated(RankPlan(groups=groups, requested_ratio=0.5))
    return {f.group: f.basis @ f.coefficients[f.group.layers[0]] for f in truncated}


@pytest.mark.parametrize("layout", [PlainLayout(), PivotedLayout()])
def test_kept_are_the_ranks_that_cost_less_than_the_dense_group(layout: Layout) -> None:
    for group, entry in decompose_groups(GROUPS, measures(Cache(None)), layout).entries.items():
        rank = entry.length("basis_t")
        assert layout.parameters(group, rank) < group.parameters
        assert rank == group.full_rank or layout.parameters(group, rank + 1) >= group.parameters
        assert entry.length("coefficients") == rank and entry.length("energies") == group.full_rank


def test_corrections_are_made_of_all_components() -> None:
    group = replace(GROUPS[0], correction=2)
    [entry] = decompose_groups([group], measures(Cache(None)), PlainLayout()).entries.values()
    assert entry.length("basis_t") == group.full_rank


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_plan_that_wants_more_gets_it(tmp_path: Path, dtype: str) -> None:
    whole = products(decompose_groups(GROUPS, measures(Cache(None))), rank=10_000)
    found = decompose_groups(GROUPS, measures(Cache(tmp_path, dtype=dtype)), PlainLayout())
    for group, product in products(found, rank=10_000).items():
        assert product.dtype is torch.float64
        torch.testing.assert_close(product, whole[group], rtol=0, atol=1e-12 if dtype == "float64" else 1e-5)


def test_a_layout_with_higher_ranks_extends_what_is_there(tmp_path: Path) -> None:
    first, second, third = Cache(tmp_path), Cache(tmp_path), Cache(tmp_path)
    plain = products(decompose_groups(GROUPS, measures(first), PlainLayout()), rank=8)
    longer = decompose_groups(GROUPS, measures(second), PivotedLayout())
    assert second.made and not second.misses[KIND]
    again = decompose_groups(GROUPS, measures(third), PlainLayout())
    assert not third.made
    for found in (longer, again):
        assert all(torch.equal(product, plain[group]) for group, product in products(found, rank=8).items())


def test_fp32_halves_the_files_and_hardly_moves_the_products(tmp_path: Path) -> None:
    sizes, found = {}, {}
    for dtype in ("float64", "float32"):
        made = decompose_groups(GROUPS, measures(Cache(tmp_path / dtype, dtype=dtype)), PivotedLayout())
        sizes[dtype] = {entry.length("basis_t") for entry in made.entries.values()}
        assert {entry.rows("basis_t", 1).dtype for entry in made.entries.values()} == {getattr(torch, dtype)}
        found[dtype] = products(made, rank=16)
    assert sizes["float64"] == sizes["float32"]
    for group, product in found["float64"].items():
        other = found["float32"][group]
        assert not torch.equal(other, product)
        assert float((other - product).norm()) <= 1e-5 * float(product.norm())


def test_another_rounding_is_another_key(tmp_path: Path) -> None:
    decompose_groups(GROUPS, measures(Cache(tmp_path, dtype="float32")), PlainLayout())
    other = Cache(tmp_path)
    decompose_groups(GROUPS, measures(other), PlainLayout())
    assert not other.hits[KIND] and not other.hits["gram"]


@pytest.mark.parametrize(("dtype", "width"), [("float64", 8), ("float32", 4)])
def test_grams_are_stored_once(tmp_path: Path, dtype: str, width: int) -> None:
    measures(Cache(tmp_path, dtype=dtype)).gather()
    sites = {m.input_site: m.d_in for m in DENSE.architecture.matrices}
    files = [file for file in cache_files(tmp_path) if file.kind == "gram"]
    assert len(files) == len(sites)
    headers = 1024
    for file in files:
        assert any(0 < file.bytes - width * size * (size + 1) // 2 < headers for size in set(sites.values()))


@pytest.mark.parametrize("on_disk", [True, False])
def test_rounds_leave_nothing_behind_unless_asked(tmp_path: Path, on_disk: bool) -> None:
    recipe = replace(RECIPE, allocation=WaterFilling(min_ratio=0.0), schedule=EqualSteps(size=0.1), retain_ratio=0.7)
    plans = {}
    for keep in (True, False):
        cache = Cache(tmp_path / str(keep) if on_disk else None, keep_rounds=keep)
        plans[keep] = compress(tiny_random(), recipe, Workspace(cache, Progress(quiet=True))).plan
        groups, sites = len(plans[keep].groups), len({m.input_site for m in DENSE.architecture.matrices})
        made = [name for name in dict.fromkeys(cache.made) if name.startswith((f"{KIND}/", "gram/"))]
        assert len(made) == 3 * (groups + sites)
        left = [name for name in made if cache.find(*name.split("/")) is not None]
        assert left == (made if keep else made[2 * (groups + sites) :])
    assert plans[True] == plans[False]


class Elsewhere:
    """A model on a device whose tensors have no values, which stands for one without enough memory."""

    def __init__(self) -> None:
        self.device = torch.device("meta")

    def __getattr__(self, name: str) -> object:
        return getattr(DENSE, name)


def test_what_a_device_has_no_memory_for_is_made_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    tried: list[str] = []

    def make(group: WeightGroup, weight: Tensor, metric: Metric) -> Decomposition:
        tried.append(weight.device.type)
        if weight.device.type == "meta":
            raise torch.OutOfMemoryError("no room")
        return decompose(group, weight, metric)

    here = replace(measures(Cache(None)), needs=frozenset(), whitening=IdentityWhitening())
    there = replace(
        here, dense=cast("LoadedModel", Elsewhere()), workspace=Workspace(Cache(None), Progress(quiet=False))
    )
    found, expected = there.made(make, GROUPS[0]), here.made(make, GROUPS[0])
    assert tried == ["meta", "cpu", "cpu"] and torch.equal(found.coefficients, expected.coefficients)
    assert f"{GROUPS[0].name} is decomposed on the CPU: the memory of meta" in capsys.readouterr().err


def test_the_cpu_has_no_place_to_turn_to() -> None:
    def make(group: WeightGroup, weight: Tensor, metric: Metric) -> Decomposition:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        measures(Cache(None)).made(make, GROUPS[0])
