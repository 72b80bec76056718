"""Estimates from shapes against what really happens: passes, factorisations by shape, bytes by kind."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bs_exp.allocation.uniform import UniformAllocation
from bs_exp.cache import Cache
from bs_exp.estimate import traced
from bs_exp.estimate.estimate import FACTORS, SAVED, STEPS, Estimate, Place, Windows, estimate
from bs_exp.estimate.ledger import _DECOMPOSITIONS, shape_of
from bs_exp.estimate.traced import Traced
from bs_exp.files import file_sizes
from bs_exp.importance.none import NoImportance
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.loading import LocalModel
from bs_exp.models.saving import save_model
from bs_exp.models.tiny import MIXTURES, TinyRandom, tiny_random
from bs_exp.pipeline import Recipe, compress
from bs_exp.progress import Progress
from bs_exp.schedule.adaptive_steps import AdaptiveSteps
from bs_exp.schedule.single import SingleRound
from bs_exp.schedule.steps import EqualSteps
from bs_exp.sharing.adjacent import AdjacentSharing
from bs_exp.sharing.none import NoSharing, singles
from bs_exp.types import GroupStatistics, LoadedModel, Metric, Statistic
from bs_exp.update.natural_gradient import NaturalGradient
from bs_exp.update.none import NoUpdate
from bs_exp.update.refit import Refit
from bs_exp.whitening.gram import GramWhitening
from bs_exp.whitening.identity import IdentityWhitening
from bs_exp.whitening.two_sided import TwoSidedWhitening
from bs_exp.workspace import Workspace
from tests.support.recipes import RECIPE, RandomTokens

QUIET = Progress(quiet=True)
HOST = Place(torch.device("cpu"))
REFIT = Refit(mode="sequential", inputs="compressed", target="mixed", beta=None, gram="layer", ridge=1e-6, below=None)
SVD_LLM = Recipe(
    calibration=RandomTokens(),
    sharing=NoSharing(),
    whitening=GramWhitening(ridge=1e-6),
    importance=NoImportance(),
    allocation=UniformAllocation(),
    layout=PlainLayout(),
    schedule=SingleRound(),
    update=NoUpdate(),
    retain_ratio=0.8,
)
BEST = dataclasses.replace(
    SVD_LLM,
    whitening=TwoSidedWhitening(ridge=1e-4, damping=1e-2, temper=1.0),
    layout=PivotedLayout(),
    schedule=EqualSteps(size=0.1),
    update=REFIT,
)


def windows(recipe: Recipe) -> Windows:
    assert isinstance(recipe.calibration, RandomTokens)
    return Windows(recipe.calibration.count, 32, recipe.calibration.batch_size)


class Factorisations(TorchDispatchMode):
    """Counts factorisations of real matrices by kind and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DECOMPOSITIONS:
            self.found[_DECOMPOSITIONS[func][0], *shape_of(func, args, kwargs or {})] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def passes_of(model: LoadedModel) -> Iterator[Counter[str]]:
    """Windows that go through the last block of a model, and gradients that come to it."""
    found: Counter[str] = Counter()

    def see(block: Any, arguments: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        found["forward"] += len(states)
        if states.requires_grad:
            states.register_hook(lambda gradient: found.update(backward=len(gradient)))

    handle = model.module.get_submodule(model.architecture.blocks[-1]).register_forward_hook(see)
    yield found
    handle.remove()


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(SVD_LLM, id="svd_llm"),
        pytest.param(dataclasses.replace(SVD_LLM, whitening=IdentityWhitening()), id="svd"),
        pytest.param(RECIPE, id="basis_sharing"),
        pytest.param(BEST, id="best"),
    ],
)
def test_what_is_estimated_happens(recipe: Recipe, tmp_path: Path) -> None:
    """Oracle: the compression itself, counted from outside; the cache's folder and the saved model, measured."""
    dense = tiny_random("llama", layers=4)
    found = estimate(dense, recipe, windows(recipe), Cache(tmp_path), HOST, save_model=True)
    assert not list(tmp_path.iterdir())  # an estimate writes nothing
    with Factorisations() as counted, passes_of(dense) as through:
        compressed = compress(dense, recipe, Workspace(Cache(tmp_path), QUIET))
    assert compressed.rounds == found.rounds.ratios and found.rounds.least == len(compressed.rounds)
    # Ranks are the allocation's: of its shapes alone the sizes are not known before.
    of_ranks = {"pivoted qr"} if recipe.update is not REFIT else {"pivoted qr", "qr", "triangular solve"}
    expected = Counter({(d.kind, d.rows, d.columns): n for d, n in found.decompositions.items()})
    assert _of_shapes(expected, of_ranks) == _of_shapes(counted.found, of_ranks)
    assert sum(expected.values()) == sum(counted.found.values())
    if len(compressed.rounds) == 1 and recipe.update is not REFIT:  # else they go through other models, too
        count = windows(recipe).count
        assert through["forward"] == found.forward * count and through["backward"] == found.backward * count
    sizes = Counter[str]()
    for name, size in file_sizes(tmp_path).items():
        if name.endswith(".safetensors"):
            sizes[name.split("/")[0]] += size
    assert {kind for kind in found.disk if kind not in (SAVED, "tokenisation")} == set(sizes)
    for kind, size in sizes.items():
        # Headers of files with a thousand numbers weigh; of real models they do not.
        assert found.disk[kind] == pytest.approx(size, rel=0.05), kind
    save_model(compressed.module, dense.tokenizer, tmp_path / "saved")
    assert found.disk[SAVED] == pytest.approx((tmp_path / "saved" / "model.safetensors").stat().st_size, rel=0.05)


def _of_shapes(counts: Counter[tuple[str, int, int]], without: set[str]) -> dict[tuple[str, int, int], int]:
    """Those whose shapes are the model's: eigenvectors of whole sides, and no kind that depends on ranks."""
    sides = {16, 32, 48}
    return {key: n for key, n in counts.items() if key[0] not in without and set(key[1:]) <= sides}


def test_no_weight_is_read_and_depth_costs_no_time(tmp_path: Path) -> None:
    """A folder with config.json alone; the memory of the statistics grows with the blocks, as it does in a run."""
    config = tiny_random("llama").module.config
    sizes = []
    for layers in (4, 8, 12):
        config.num_hidden_layers = layers
        config.save_pretrained(tmp_path)
        shapes = LocalModel(path=str(tmp_path), device="cpu").shapes()
        assert shapes.module.device.type == "meta" and len(shapes.architecture.blocks) == layers
        found = estimate(shapes, SVD_LLM, windows(SVD_LLM), Cache(tmp_path / "cache"), HOST)
        sizes.append((found.disk["gram"], found.disk[FACTORS], sum(found.decompositions.values())))
    assert all(two - one == three - two > 0 for one, two, three in zip(*sizes, strict=True))


def test_rounds_that_depend_on_losses_are_a_range() -> None:
    recipe = dataclasses.replace(SVD_LLM, schedule=AdaptiveSteps(max_loss=0.1, min_size=0.02, max_size=0.1))
    found = estimate(tiny_random("llama"), recipe, windows(recipe), Cache(None), HOST)
    assert found.rounds.told == "2 to 10 rounds" and "AdaptiveSteps: 2 to 10 rounds" in found.unknown[0]


@dataclasses.dataclass(frozen=True)
class LooksAtValues:
    """A whitening of somebody else, which leaves PyTorch."""

    needs = frozenset({Statistic.GRAM})

    def metric(self, statistics: GroupStatistics) -> Metric:
        assert statistics.gram is not None
        return Metric(whitener=torch.from_numpy(statistics.gram.numpy()))


def test_what_cannot_be_known_is_said() -> None:
    recipe = dataclasses.replace(SVD_LLM, whitening=LooksAtValues())
    found = estimate(tiny_random("llama"), recipe, windows(recipe), Cache(None), HOST)
    assert len(found.unknown) == 1 and found.unknown[0].startswith("LooksAtValues, NoImportance: seconds and memory")
    # What stages around it take is known all the same.
    assert found.forward == 1 and found.stages["calibrate"].flops


@pytest.mark.parametrize("recipe", [SVD_LLM, BEST, dataclasses.replace(SVD_LLM, whitening=LooksAtValues())])
def test_points_of_a_sweep_trace_once_what_they_share(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second ratio, and the same with nothing known."""
    known = Traced()

    def at(ratio: float, known: Traced, length: int = 32) -> Estimate:
        given = dataclasses.replace(windows(recipe), length=length)
        point = dataclasses.replace(recipe, retain_ratio=ratio)
        return estimate(dense, point, given, Cache(None), HOST, held=10**12, known=known)  # held: all of the process

    dense = tiny_random("llama")
    first = at(0.8, known)
    gathered: list[object] = []
    gather = traced.gather
    monkeypatch.setattr(traced, "gather", lambda *given, **named: gathered.append(given[2]) or gather(*given, **named))
    second = at(0.6, known)
    assert not gathered and second.unknown == first.unknown
    assert second.to_dict() == at(0.6, Traced()).to_dict() and gathered
    # Other windows are traced anew.
    gathered.clear()
    at(0.6, known, length=64)
    assert gathered


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "bert", "t5", *MIXTURES])
def test_families(family: str, tmp_path: Path) -> None:
    shapes = TinyRandom(family=family).shapes()
    recipe = dataclasses.replace(SVD_LLM, sharing=AdjacentSharing(matrices=("q", "k", "v", "qkv"), group_size=2))
    found = estimate(shapes, recipe, windows(recipe), Cache(tmp_path), HOST, save_model=True)
    compressed = compress(tiny_random(family), recipe, Workspace(Cache(tmp_path), QUIET))
    assert not found.unknown and found.forward == 1
    held = sum(size for name, size in file_sizes(tmp_path / "decomposition").items() if name.endswith(".safetensors"))
    assert found.disk[FACTORS] == pytest.approx(held, rel=0.05)
    assert compressed.plan.parameters <= recipe.retain_ratio * compressed.plan.dense_parameters


def test_experts_are_counted_as_what_they_are(tmp_path: Path) -> None:
    """One by one with Grams of their own, or as they are where their role says so."""
    recipe = dataclasses.replace(SVD_LLM, whitening=TwoSidedWhitening(ridge=1e-4, damping=1e-2, temper=1.0))
    apart, whole = (
        estimate(
            TinyRandom(family="mixtral", roles=roles).shapes(),
            recipe,
            windows(recipe),
            Cache(tmp_path),
            HOST,
            save_model=True,
        )
        for roles in (None, {"experts": "dense"})
    )
    assert not apart.unknown and not whole.unknown
    assert apart.backward == whole.backward == 1
    compress(tiny_random("mixtral"), recipe, Workspace(Cache(tmp_path), QUIET))
    held = sum(size for name, size in file_sizes(tmp_path / "gram").items() if name.endswith(".safetensors"))
    assert apart.disk[Statistic.GRAM] == pytest.approx(held, rel=0.05)
    assert whole.disk[Statistic.GRAM] < apart.disk[Statistic.GRAM] / 2
    assert whole.disk[FACTORS] < apart.disk[FACTORS] / 2


def test_no_cycles_are_collected_between_traces_that_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Collected in one of two alone, what stood in cycles was taken for that of a block: 84 GB were told for 24."""
    collecting: list[bool] = []

    def first_blocks(model: LoadedModel, depth: int) -> LoadedModel:
        collecting.append(gc.isenabled())
        return original(model, depth)

    original = traced.first_blocks
    monkeypatch.setattr(traced, "first_blocks", first_blocks)
    estimate(tiny_random("llama", layers=12), BEST, windows(BEST), Cache(tmp_path), HOST, save_model=True)
    assert len(collecting) > 2 and not any(collecting) and gc.isenabled()


def test_steps_of_an_update_are_counted(tmp_path: Path) -> None:
    """Passes over the windows that its steps read, and what the cache holds of them meanwhile."""
    dense = tiny_random("llama", layers=4)
    update = NaturalGradient(
        loss="labels", steps=1, windows=4, ridge=0.01, damping=1.0, holdout=0.25, first_length=0.1, seed=0
    )
    recipe = dataclasses.replace(SVD_LLM, update=update)
    found, without = (estimate(dense, each, windows(each), Cache(tmp_path), HOST) for each in (recipe, SVD_LLM))
    count = windows(recipe).count
    assert found.backward == math.ceil(4 / count) and without.backward == 0
    assert found.forward > without.forward
    # Oracle: the steps themselves. Trials are as many as the losses will have.
    compress(dense, SVD_LLM, Workspace(Cache(tmp_path), QUIET))
    with Factorisations() as counted:
        compressed = compress(dense, recipe, Workspace(Cache(tmp_path), QUIET))
    assert compressed.update["steps"] == update.steps
    alone = Counter(
        {(d.kind, d.rows, d.columns): n for d, n in (found.decompositions - without.decompositions).items()}
    )
    for kind in ("cholesky", "cholesky solve"):
        assert {key: n for key, n in alone.items() if key[0] == kind} == {
            key: n for key, n in counted.found.items() if key[0] == kind
        }
    targeted = sum(group.parameters for group in singles(dense.architecture))
    assert found.disk[STEPS] > 4 * 4 * targeted  # a gradient of this step, and three tensors in fp32 beside it
    [told] = found.unknown
    assert told.startswith("NaturalGradient: counted are all 1 steps, with 3 lengths tried in each")
    in_memory = estimate(dense, recipe, windows(recipe), Cache(None), HOST)
    # Against another stage of the same estimate: what the process itself takes changes from one to the next.
    above, beside = (
        each.stages["update"].host_bytes - each.stages["tokenise"].host_bytes for each in (in_memory, found)
    )
    assert above - beside == found.disk[STEPS]
