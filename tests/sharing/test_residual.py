"""Shared factors and a correction for every layer: losses from the formulas, budget, and the way through a file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from bs_exp.allocation.uniform import UniformAllocation
from bs_exp.allocation.water_filling import WaterFilling
from bs_exp.cache import Cache
from bs_exp.errors import ConfigError, DecompositionError
from bs_exp.evaluation.size import measure_size
from bs_exp.importance.none import NoImportance
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.architecture import weight_of
from bs_exp.models.modeling_basis_sharing import CorrectedLinear
from bs_exp.models.saving import save_model
from bs_exp.models.surgery import find_factors, replace_matrices, to_dense, twin
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import Recipe, compress
from bs_exp.progress import Progress
from bs_exp.protocols import Layout
from bs_exp.schedule.single import SingleRound
from bs_exp.sharing.adjacent import AdjacentSharing
from bs_exp.sharing.residual import ResidualSharing
from bs_exp.testing.measures import architecture, problem
from bs_exp.types import LoadedModel, LossUnit, SharedFactors, TokenWindows, WeightGroup
from bs_exp.update.none import NoUpdate
from bs_exp.whitening.gram import GramWhitening
from bs_exp.whitening.identity import IdentityWhitening
from bs_exp.whitening.two_sided import TwoSidedWhitening
from bs_exp.workspace import Workspace

LAYOUTS: list[Layout] = [PlainLayout(), PivotedLayout()]


@dataclass(frozen=True, kw_only=True)
class RandomTokens:
    """Calibration on random tokens."""

    batch_size: int = 8

    def windows(self, tokenizer: object) -> TokenWindows:
        ids = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
        return TokenWindows(ids=ids, provenance={"sha256": "random"})


def residual(rank: int, group_size: int = 2) -> ResidualSharing:
    return ResidualSharing(matrices=("q", "k", "v", "up"), group_size=group_size, residual_rank=rank)


RECIPE = Recipe(
    calibration=RandomTokens(),
    sharing=residual(2),
    whitening=GramWhitening(ridge=1e-3),
    importance=NoImportance(),
    allocation=UniformAllocation(),
    layout=PlainLayout(),
    schedule=SingleRound(),
    update=NoUpdate(),
    retain_ratio=0.7,
)


def compressed(dense: LoadedModel, **changes: Any) -> Any:
    return compress(dense, replace(RECIPE, **changes), Workspace(Cache(None), Progress(quiet=True)))


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    found: Tensor = model(torch.arange(24).view(2, 12)).logits
    return found


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rank_zero_is_adjacent_sharing() -> None:
    case = problem(architecture(5, q=(8, 8), up=(8, 12), down=(12, 8)))
    adjacent = AdjacentSharing(matrices=("q", "k", "v", "up"), group_size=2)
    assert residual(0).groups(case) == adjacent.groups(case)
    dense = tiny_random("llama")
    none, plain = compressed(dense, sharing=residual(0)), compressed(dense, sharing=adjacent)
    assert none.plan == plain.plan and torch.equal(logits_of(none.module), logits_of(plain.module))


def test_a_group_of_one_needs_no_correction() -> None:
    case = problem(architecture(5, q=(40, 40), down=(60, 40)))
    groups = residual(2).groups(case)
    assert [(g.layers, g.correction) for g in groups if g.matrix == "q"] == [((0, 1), 2), ((2, 3), 2), ((4,), 0)]
    assert all(g.correction == 0 for g in groups if g.matrix == "down")


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_predicted_losses_budget_and_size_are_those_of_the_model(layout: Layout, family: str) -> None:
    dense = tiny_random(family)
    dense.module.double()
    found = compressed(dense, layout=layout, whitening=IdentityWhitening())
    shared = [p for p in found.plan.groups if p.group.correction]
    assert shared and found.plan.retain_ratio <= 0.7
    for planned in found.plan.groups:
        lost = []
        for layer in planned.group.layers:
            matrix = dense.architecture.by_position[planned.group.matrix, layer]
            restored = found.module.get_submodule(matrix.module)
            restored = restored.to_dense() if hasattr(restored, "to_dense") else restored
            lost.append((weight_of(dense.module, matrix) - restored.weight.T).detach())
        assert planned.predicted_loss == pytest.approx(float(torch.cat(lost, 1).norm()), rel=1e-6)
    if layout.name == "plain":  # pivot bits are no parameters
        assert measure_size(dense, found, found.plan)["targeted_parameters"] == found.plan.parameters
    entry = next(g for g in found.plan.to_dict()["groups"] if g["matrix"] == "q")
    assert entry["correction"] == 2


def test_in_nats_with_water_filling_the_budget_is_spent() -> None:
    changes = {
        "whitening": TwoSidedWhitening(ridge=1e-6, damping=1e-2, temper=1.0),
        "allocation": WaterFilling(min_ratio=0.0),
    }
    found = compressed(tiny_random("llama"), **changes)
    assert 0.67 < found.plan.retain_ratio <= 0.7
    assert {p.loss_unit for p in found.plan.groups} == {LossUnit.NATS}
    assert logits_of(found.module).isfinite().all()


@pytest.fixture(scope="module")
def models() -> Callable[[str], tuple[LoadedModel, Any]]:
    made: dict[str, tuple[LoadedModel, Any]] = {}

    def get(layout: str) -> tuple[LoadedModel, Any]:
        if layout not in made:
            dense = tiny_random("qwen2")
            made[layout] = dense, compressed(dense, layout={"plain": LAYOUTS[0], "pivoted": LAYOUTS[1]}[layout])
        return made[layout]

    return get


@pytest.mark.parametrize("layout", ["plain", "pivoted"])
def test_saved_and_loaded_and_made_dense(models: Any, layout: str, tmp_path: Path) -> None:
    dense, found = models(layout)
    logits = logits_of(found.module)
    save_model(found.module, dense.tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(loaded), logits)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits)
    first, second = (loaded.get_submodule(f"model.layers.{i}.self_attn.q_proj") for i in (0, 1))
    assert isinstance(first, CorrectedLinear) and first.shared.basis is second.shared.basis
    assert first.weight is not second.weight and "correction=2" in repr(first)
    restored = to_dense(loaded)
    torch.testing.assert_close(logits_of(restored), logits, rtol=1e-4, atol=5e-5)
    assert [type(m) for m in restored.modules()] == [type(m) for m in dense.module.modules()]


def test_corrections_can_be_trained(models: Any) -> None:
    _, found = models("plain")
    names = find_factors(found.module)
    assert "model.layers.1.self_attn.q_proj.down" in names and "model.layers.1.self_attn.q_proj.weight" in names
    assert "model.layers.0.self_attn.q_proj.shared.basis" in names
    assert sum(p.numel() for p in names.values()) == sum(p.parameters for p in found.plan.groups if p.rank is not None)


def test_a_process_without_the_plugin_refuses(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, found = models("plain")
    save_model(found.module, dense.tokenizer, tmp_path / "model")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "basis_sharing")
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "basis_sharing")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"  # where the word for others is gone, or not read, shapes do not fit
    config.write_text(re.sub('"transformers_weights": .*', "", config.read_text()))
    with pytest.raises((RuntimeError, ValueError), match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_corrections_beyond_the_budget_are_refused_before_any_work() -> None:
    case = problem(architecture(4, q=(40, 40)), ratio=0.5)
    # 0.5 * 3200 = 1600; a shared component costs 120, a correction of rank 1 for both layers 160.
    assert residual(9).groups(case)
    with pytest.raises(ConfigError, match=r"residual_rank must be at most 9 for q\[0,1\] .*retain_ratio 0\.5, got 10"):
        residual(10).groups(case)
    with pytest.raises(ConfigError, match="residual_rank must be a whole number of at least 0, got -1"):
        residual(-1)
    with pytest.raises(ConfigError, match=r"sharing\.group_size must be between 1 and 4 .*got 5"):
        residual(1, group_size=5).check(architecture(4, q=(40, 40)))


def test_factors_without_their_corrections_are_refused() -> None:
    dense = tiny_random("llama")
    group = WeightGroup("q", (0, 1), 32, 32, correction=2)
    bare = SharedFactors(group, normal(32, 3), {0: normal(3, 32), 1: normal(3, 32)})
    with pytest.raises(DecompositionError, match=r"corrections of the ranks \{\} by layer, needed is 2 for each"):
        replace_matrices(twin(dense.module), dense.architecture, [bare], LAYOUTS[0])
