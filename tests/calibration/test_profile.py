"""Sensitivity and block outputs are what the formulas say, are gathered only on demand, and reach the allocator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bs_exp.allocation.dipsvd_heuristic import DipSvdHeuristic
from bs_exp.allocation.uniform import UniformAllocation
from bs_exp.cache import Cache
from bs_exp.calibration.profile import profile_blocks
from bs_exp.errors import CalibrationError
from bs_exp.importance.none import NoImportance
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.architecture import module_of
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import Recipe, compress
from bs_exp.progress import Progress
from bs_exp.protocols import AllocationProblem, Layout
from bs_exp.schedule.steps import EqualSteps
from bs_exp.sharing.none import NoSharing
from bs_exp.types import CalibrationData, LayerProfile, LoadedModel, RankPlan, Statistic, TokenWindows, WeightGroup
from bs_exp.update.none import NoUpdate
from bs_exp.whitening.gram import GramWhitening
from bs_exp.whitening.identity import IdentityWhitening
from bs_exp.workspace import Workspace

FAMILIES = ["llama", "gpt2", "opt", "phi3", "bloom", "falcon", "gpt_neox", "mixtral"]


def tokens(count: int = 5, length: int = 16) -> TokenWindows:
    ids = torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(0))
    return TokenWindows(ids=ids, provenance={"sha256": f"{count}x{length}"})


@dataclass(frozen=True, kw_only=True)
class FixedTokens:
    batch_size: int = 2

    def windows(self, tokenizer: object) -> TokenWindows:
        return tokens()


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Uniform, and keeps the profiles that it is given."""

    wants: frozenset[Statistic]
    seen: list[LayerProfile | None]

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", self.wants)

    def check(self, groups: tuple[WeightGroup, ...], retain_ratio: float, layout: Layout) -> None:
        return None

    def allocate(self, problem: AllocationProblem) -> RankPlan:
        self.seen.append(problem.profile)
        return UniformAllocation().allocate(problem)


def recipe(**dials: object) -> Recipe:
    settings: dict[str, object] = {
        "calibration": FixedTokens(), "sharing": NoSharing(), "whitening": GramWhitening(ridge=1e-6),
        "importance": NoImportance(), "layout": PlainLayout(), "schedule": EqualSteps(size=1.0), "update": NoUpdate(),
        "retain_ratio": 0.6,
        "allocation": DipSvdHeuristic(
            sign="paper", beta=0.5, effective_rank="singular_values", threshold=0.95, spread=0.2, min_ratio=None,
            max_ratio=None,
        ),
    }  # fmt: skip
    return Recipe(**(settings | dials))  # type: ignore[arg-type]


def profile(model: LoadedModel, *needs: Statistic, batch_size: int = 2) -> LayerProfile:
    data = CalibrationData(tokens(), batch_size)
    return profile_blocks(model, data, needs=set(needs), workspace=Workspace(Cache(None), Progress(quiet=True)))


def sensitivity_of(model: LoadedModel) -> Tensor:
    found = profile(model, Statistic.SENSITIVITY).sensitivity
    assert found is not None
    return found


def output_singular_values_of(model: LoadedModel) -> Mapping[int, Tensor]:
    found = profile(model, Statistic.BLOCK_OUTPUTS).output_singular_values
    assert found is not None
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_sensitivity_is_the_relative_size_of_the_gradients(family: str) -> None:
    """Oracle: autograd's own gradients of the mean loss of each batch, for all targeted weights at once."""
    model = tiny_random(family)
    found = sensitivity_of(model)
    matrices = model.architecture.matrices
    weights = [module_of(model.module, m).weight for m in matrices]
    expected = torch.zeros(model.architecture.num_layers, dtype=torch.float64)
    for ids in tokens().ids.split(2):
        logits = model.module(ids).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for m, weight, gradient in zip(matrices, weights, torch.autograd.grad(loss, weights), strict=True):
            expected[m.layer] += float(gradient.norm() / weight.detach().norm()) / 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None and p.requires_grad for p in model.module.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_block_outputs_have_their_own_singular_values(family: str) -> None:
    """Oracle: the model's own hidden states, stacked, by a full SVD. The last one is taken before the final norm."""
    model = tiny_random(family)
    found = output_singular_values_of(model)
    kept: dict[int, Tensor] = {}
    last = model.module.get_submodule(model.architecture.blocks[-1])
    handle = last.register_forward_hook(
        lambda module, arguments, output: kept.update({0: output[0] if isinstance(output, tuple) else output})
    )
    with torch.no_grad():
        states = model.module(tokens().ids, output_hidden_states=True).hidden_states
    handle.remove()
    outputs = [*states[1:-1], kept[0]]
    assert len(found) == len(outputs) == model.architecture.num_layers
    for values, output in zip(found.values(), outputs, strict=True):
        exact = torch.linalg.svdvals(output.reshape(-1, output.shape[-1]).double())
        torch.testing.assert_close(values, exact, rtol=1e-4, atol=1e-5)


def test_flags_gradients_and_hooks_are_as_before() -> None:
    model = tiny_random()
    embeddings = model.module.get_input_embeddings().weight
    kept = torch.ones_like(embeddings)
    embeddings.requires_grad_(False)
    first = module_of(model.module, model.architecture.matrices[0]).weight
    first.grad = torch.full_like(first, 3.0)
    embeddings.grad = kept
    sensitivity_of(model)
    output_singular_values_of(model)
    assert not embeddings.requires_grad and embeddings.grad is kept
    assert bool((first.grad == 3.0).all())
    assert all(p.grad is None for p in model.module.parameters() if p is not first and p is not embeddings)
    assert sum(len(m._forward_hooks) for m in model.module.modules()) == 0
    assert not any(p._post_accumulate_grad_hooks for p in model.module.parameters())


def test_nan_names_the_layer_and_leaves_no_hooks() -> None:
    model = tiny_random()
    with torch.no_grad():
        module_of(model.module, model.architecture.by_position["o", 1]).weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="outputs of layer 1 hold NaN"):
        output_singular_values_of(model)
    with pytest.raises(CalibrationError, match="gradients of layer 0 hold NaN"):
        sensitivity_of(model)
    assert sum(len(m._forward_hooks) for m in model.module.modules()) == 0


@pytest.mark.parametrize("whitening", [GramWhitening(ridge=1e-6), IdentityWhitening()], ids=repr)
def test_the_profile_is_gathered_once_and_reaches_the_allocator_past_the_cache(
    whitening: object, tmp_path: Path
) -> None:
    dense = tiny_random()
    compress(
        dense,
        recipe(whitening=whitening, allocation=UniformAllocation()),
        Workspace(Cache(tmp_path), Progress(quiet=True)),
    )
    first, progress = Cache(tmp_path), Progress(quiet=True)
    made = compress(dense, recipe(whitening=whitening), Workspace(first, progress))
    assert first.misses == {"sensitivity": 1, "block_outputs": 1}  # the decompositions are those of the other run
    assert "profile" in progress.timings and "calibrate" not in progress.timings
    second = Cache(tmp_path)
    again = compress(dense, recipe(whitening=whitening), Workspace(second, Progress(quiet=True)))
    assert second.misses == {} and again.plan == made.plan
    assert made.plan.retain_ratio == pytest.approx(0.6, abs=0.005)


def test_an_allocator_that_needs_nothing_gets_nothing() -> None:
    seen: list[LayerProfile | None] = []
    progress, cache = Progress(quiet=True), Cache(None)
    compress(tiny_random(), recipe(allocation=Recording(wants=frozenset(), seen=seen)), Workspace(cache, progress))
    assert seen == [None] * len(seen) and "profile" not in progress.timings and cache.misses["sensitivity"] == 0


def test_only_what_is_needed_is_gathered() -> None:
    seen: list[LayerProfile | None] = []
    wanted = Recording(wants=frozenset({Statistic.BLOCK_OUTPUTS}), seen=seen)
    cache = Cache(None)
    compress(tiny_random(), recipe(allocation=wanted), Workspace(cache, Progress(quiet=True)))
    assert cache.misses["block_outputs"] == 1 and cache.misses["sensitivity"] == 0
    profile = seen[0]
    assert profile is not None and profile.sensitivity is None and len(profile.output_singular_values or {}) == 3


def test_other_windows_and_weights_are_other_profiles(tmp_path: Path) -> None:
    compress(tiny_random(), recipe(), Workspace(Cache(tmp_path), Progress(quiet=True)))
    for model, calibration in ((tiny_random(seed=1), FixedTokens()), (tiny_random(), FixedTokens(batch_size=5))):
        cache = Cache(tmp_path)
        compress(model, recipe(calibration=calibration), Workspace(cache, Progress(quiet=True)))
        assert cache.hits["sensitivity"] == 0 and cache.misses["sensitivity"] == 1


def test_several_rounds_use_the_profile_of_the_dense_model() -> None:
    cache = Cache(None)
    made = compress(tiny_random(), recipe(schedule=EqualSteps(size=0.2)), Workspace(cache, Progress(quiet=True)))
    assert made.rounds == (0.8, 0.6) and cache.misses["sensitivity"] == 1


def test_an_impossible_budget_is_refused_before_calibration() -> None:
    progress = Progress(quiet=True)
    with pytest.raises(ValueError, match=r"retain_ratio 0\.03 is below"):
        compress(tiny_random(), replace(recipe(), retain_ratio=0.03), Workspace(Cache(None), progress))
    assert progress.timings.keys() <= {"group"}
