"""The stages together, on tiny models of every family: what is predicted is measured, and nothing is done twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bs_exp.cache import Cache, Entry
from bs_exp.errors import CacheError, ConfigError, DecompositionError
from bs_exp.importance.adaptive_channel import AdaptiveChannelImportance
from bs_exp.importance.channel import ChannelImportance
from bs_exp.importance.soft_channel import SoftChannelImportance
from bs_exp.models.architecture import module_of
from bs_exp.models.tiny import FAMILIES, tiny_random
from bs_exp.pipeline import compress
from bs_exp.progress import Progress
from bs_exp.sharing.adjacent import AdjacentSharing
from bs_exp.sharing.none import NoSharing
from bs_exp.types import LoadedModel
from bs_exp.whitening.block_diagonal import BlockDiagonalWhitening
from bs_exp.whitening.diagonal import DiagonalWhitening
from bs_exp.whitening.fisher_rows import FisherRowsWhitening
from bs_exp.whitening.gram import GramWhitening
from bs_exp.whitening.identity import IdentityWhitening
from bs_exp.workspace import Workspace
from tests.support.recipes import RECIPE, RandomTokens


def inputs_of_every_matrix(model: LoadedModel, ids: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    handles = [
        module_of(model.module, m).register_forward_pre_hook(
            lambda module, arguments, name=m.module: seen.__setitem__(name, arguments[0].detach().clone())
        )
        for m in model.architecture.matrices
    ]
    with torch.no_grad():
        model.module(ids)
    for handle in handles:
        handle.remove()
    return seen


def dense_weight(layer: torch.nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return (weight.T if isinstance(layer, torch.nn.Linear) else weight).detach()


# Mixtral's fused experts have no fp64 kernel on the CPU.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])
def test_predicted_losses_are_measured_in_the_compressed_model(family: str) -> None:
    """Oracle: the inputs of a group's layers, stacked, times the difference of the stored products."""
    dense = tiny_random(family)
    dense.module.double()
    recipe = replace(RECIPE, calibration=RandomTokens(count=8))
    compressed = compress(dense, recipe, Workspace(Cache(None), Progress(quiet=True)))
    inputs = inputs_of_every_matrix(dense, recipe.calibration.windows(dense.tokenizer).ids)
    assert 0.5 < compressed.plan.retain_ratio <= 0.6
    for planned in compressed.plan.groups:
        matrices = [dense.architecture.by_position[planned.group.matrix, layer] for layer in planned.group.layers]
        stacked = torch.cat([inputs[m.module].reshape(-1, m.d_in) for m in matrices])
        lost = [
            dense_weight(module_of(dense.module, m))
            - dense_weight(compressed.module.get_submodule(m.module).to_dense())  # type: ignore[operator]
            for m in matrices
        ]
        measured = float((stacked @ torch.cat(lost, dim=1)).norm())
        assert planned.predicted_loss == pytest.approx(measured, rel=1e-6), planned.group.name


@pytest.mark.parametrize(
    ("changes", "unit"),
    [
        ({}, "output_norm"),
        ({"importance": ChannelImportance(p=0.1, a=4.0, form="two_sided")}, "metric_norm"),
        ({"whitening": IdentityWhitening()}, "metric_norm"),
        ({"whitening": DiagonalWhitening(alpha=0.5, size="mean", epsilon=1e-6)}, "metric_norm"),
    ],
)
def test_the_unit_says_what_a_predicted_loss_is(changes: dict[str, Any], unit: str, tmp_path: Path) -> None:
    dense, recipe = tiny_random("llama", layers=2), replace(RECIPE, **changes)
    for _ in range(2):  # made, then read from the cache
        plan = compress(dense, recipe, Workspace(Cache(tmp_path), Progress(quiet=True))).plan.to_dict()
        assert {group["loss_unit"] for group in plan["groups"]} == {unit}


def test_weights_that_overflow_are_not_taken_for_a_silent_text() -> None:
    """Squares of 1e25 are infinite in fp32, and a norm divides by their root."""
    dense = tiny_random("llama", layers=2)
    with torch.no_grad():
        dense.module.get_input_embeddings().weight.mul_(1e25)
    with pytest.raises(DecompositionError, match=r"weights before them are huge.*model\.dtype=float32"):
        compress(dense, RECIPE, Workspace(Cache(None), Progress(quiet=True)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_dense_model_is_untouched_and_shared(family: str) -> None:
    dense = tiny_random(family)
    before = {name: value.clone() for name, value in dense.module.state_dict().items()}
    compressed = compress(dense, RECIPE, Workspace(Cache(None), Progress(quiet=True)))
    after = dense.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert compressed.module.get_input_embeddings().weight is dense.module.get_input_embeddings().weight


def test_a_group_of_one_is_plain_whitened_svd() -> None:
    dense, ids = tiny_random(), torch.arange(20)[None]
    alone = compress(dense, replace(RECIPE, sharing=NoSharing()), Workspace(Cache(None), Progress(quiet=True)))
    of_one = AdjacentSharing(matrices=("q", "up"), group_size=1)
    ones = compress(dense, replace(RECIPE, sharing=of_one), Workspace(Cache(None), Progress(quiet=True)))
    assert alone.plan == ones.plan
    with torch.no_grad():
        assert torch.equal(alone.module(ids).logits, ones.module(ids).logits)


def test_keeping_everything_is_the_dense_model() -> None:
    dense, ids = tiny_random(), torch.arange(20)[None]
    compressed = compress(dense, replace(RECIPE, retain_ratio=1.0), Workspace(Cache(None), Progress(quiet=True)))
    with torch.no_grad():
        assert torch.equal(compressed.module(ids).logits, dense.module(ids).logits)


def test_loss_falls_as_more_is_kept() -> None:
    dense, ids = tiny_random(), torch.arange(100).reshape(2, 50)
    cache = Cache(None)
    recipes = [replace(RECIPE, retain_ratio=ratio) for ratio in (0.3, 0.6, 0.9)]
    models = [compress(dense, recipe, Workspace(cache, Progress(quiet=True))).module for recipe in recipes]
    with torch.no_grad():
        target = dense.module(ids).logits
        errors = [float((model(ids).logits - target).norm()) for model in models]
    assert errors[0] > errors[1] > errors[2] > 0


def test_another_ratio_decomposes_nothing_and_cached_equals_fresh(tmp_path: Path) -> None:
    dense, ids = tiny_random(), torch.arange(20)[None]
    compress(dense, RECIPE, Workspace(Cache(tmp_path), Progress(quiet=True)))
    second, progress = Cache(tmp_path), Progress(quiet=True)
    lower = replace(RECIPE, retain_ratio=0.4)
    cached = compress(dense, lower, Workspace(second, progress))
    assert second.misses == {} and second.hits["decomposition"] == len(cached.plan.groups)
    assert "calibrate" not in progress.timings
    assert any("came from the cache" in note for note in progress.notes)
    fresh = compress(dense, lower, Workspace(Cache(None), Progress(quiet=True)))
    assert cached.plan == fresh.plan
    with torch.no_grad():
        assert torch.equal(cached.module(ids).logits, fresh.module(ids).logits)


def test_another_sharing_reuses_the_grams(tmp_path: Path) -> None:
    dense = tiny_random()
    compress(dense, RECIPE, Workspace(Cache(tmp_path), Progress(quiet=True)))
    second = Cache(tmp_path)
    compress(dense, replace(RECIPE, sharing=NoSharing()), Workspace(second, Progress(quiet=True)))
    assert second.misses["gram"] == 0 and second.hits["gram"] > 0
    # o, down and the remainder layer are groups of one already, and the same groups are found again.
    assert second.hits["decomposition"] > 0 and second.misses["decomposition"] > 0


@pytest.mark.parametrize(
    "other",
    [
        {"calibration": RandomTokens(seed=1)},
        {"calibration": RandomTokens(batch_size=4)},
        {"whitening": GramWhitening(ridge=1e-3)},
        {"whitening": IdentityWhitening()},
        {"importance": ChannelImportance(p=0.1, a=None, form="one_sided")},
    ],
    ids=repr,
)
def test_what_decompositions_depend_on_is_in_their_key(tmp_path: Path, other: dict[str, object]) -> None:
    dense = tiny_random()
    compress(dense, RECIPE, Workspace(Cache(tmp_path), Progress(quiet=True)))
    second = Cache(tmp_path)
    compress(dense, replace(RECIPE, **other), Workspace(second, Progress(quiet=True)))  # type: ignore[arg-type]
    assert second.hits["decomposition"] == 0


WHITENINGS = [
    DiagonalWhitening(alpha=0.5, size="mean", epsilon=1e-6),
    FisherRowsWhitening(ridge=1e-6),
    BlockDiagonalWhitening(blocks=4, ridge=1e-6),
]
IMPORTANCES = [
    ChannelImportance(p=0.1, a=None, form="one_sided"),
    SoftChannelImportance(p=0.1, a=None, temperature=0.5, form="two_sided"),
    AdaptiveChannelImportance(p=0.1, a_min=1.0, a_max=None, by="kurtosis", form="one_sided"),
    AdaptiveChannelImportance(p=0.1, a_min=1.0, a_max=None, by="sensitivity", form="two_sided"),
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(
    "change", [*({"whitening": w} for w in WHITENINGS), *({"importance": i} for i in IMPORTANCES)], ids=repr
)
def test_every_metric_goes_all_the_way_and_another_ratio_is_free(family: str, change: dict[str, Any]) -> None:
    dense, cache, ids = tiny_random(family), Cache(None), torch.arange(20)[None]
    recipe = replace(RECIPE, **change)
    plain = compress(dense, RECIPE, Workspace(cache, Progress(quiet=True)))
    made = compress(dense, recipe, Workspace(cache, Progress(quiet=True)))
    assert made.plan.retain_ratio == plain.plan.retain_ratio
    with torch.no_grad():
        logits = made.module(ids).logits
        assert bool(logits.isfinite().all()) and not torch.equal(logits, plain.module(ids).logits)
    misses = cache.misses.copy()
    compress(dense, replace(recipe, retain_ratio=0.4), Workspace(cache, Progress(quiet=True)))
    assert cache.misses == misses


def test_a_factor_of_one_is_no_importance() -> None:
    dense, ids = tiny_random(), torch.arange(20)[None]
    plain = compress(dense, RECIPE, Workspace(Cache(None), Progress(quiet=True)))
    for form in ("one_sided", "two_sided"):
        off = ChannelImportance(p=0.1, a=1.0, form=form)
        made = compress(dense, replace(RECIPE, importance=off), Workspace(Cache(None), Progress(quiet=True)))
        assert made.plan == plain.plan
        with torch.no_grad():
            assert torch.equal(made.module(ids).logits, plain.module(ids).logits)


@pytest.mark.parametrize("importance", IMPORTANCES, ids=repr)
@pytest.mark.parametrize("whitening", [IdentityWhitening(), *WHITENINGS[:2]], ids=repr)
def test_importance_that_cannot_act_is_refused(importance: Any, whitening: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{type(importance).__name__} re-weights the Gram.*importance=none"):
        replace(RECIPE, importance=importance, whitening=whitening)


def test_other_weights_are_another_key(tmp_path: Path) -> None:
    compress(tiny_random(seed=0), RECIPE, Workspace(Cache(tmp_path), Progress(quiet=True)))
    second = Cache(tmp_path)
    compress(tiny_random(seed=1), RECIPE, Workspace(second, Progress(quiet=True)))
    assert second.hits == {}


def test_plain_svd_needs_no_calibration() -> None:
    progress, cache = Progress(quiet=True), Cache(None)
    made = compress(tiny_random(), replace(RECIPE, whitening=IdentityWhitening()), Workspace(cache, progress))
    assert "calibrate" not in progress.timings and cache.misses["gram"] == 0 and made.calibration == {}


def test_nan_weights_name_the_matrix() -> None:
    dense = tiny_random()
    with torch.no_grad():
        module_of(dense.module, dense.architecture.by_position["k", 2]).weight[0, 0] = float("nan")
    with pytest.raises(DecompositionError, match=r"k\[2\] \(model\.layers\.2\.self_attn\.k_proj\).*NaN"):
        compress(dense, replace(RECIPE, whitening=IdentityWhitening()), Workspace(Cache(None), Progress(quiet=True)))


def test_an_interrupted_run_continues_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, done = tiny_random(), 3
    store = Cache.store

    def store_until_full(cache: Cache, kind: str, key: str, tensors: Mapping[str, Tensor]) -> Entry:
        if kind == "decomposition" and len(list(tmp_path.glob("decomposition/*"))) == done:
            raise CacheError("No space left on device")
        return store(cache, kind, key, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Cache, "store", store_until_full)
        with pytest.raises(CacheError):
            compress(dense, RECIPE, Workspace(Cache(tmp_path), Progress(quiet=True)))
    resumed = Cache(tmp_path)
    plan = compress(dense, RECIPE, Workspace(resumed, Progress(quiet=True))).plan
    assert resumed.damaged == {} and resumed.misses["gram"] == 0
    assert (resumed.hits["decomposition"], resumed.misses["decomposition"]) == (done, len(plan.groups) - done)


@pytest.mark.parametrize("ratio", [0.0, 1.2, -1.0])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ConfigError, match="retain_ratio must be above 0"):
        replace(RECIPE, retain_ratio=ratio)


@pytest.mark.parametrize("constant", [False, True], ids=["few tokens", "constant inputs"])
def test_predicted_losses_are_exact_where_grams_are_singular(constant: bool) -> None:
    """Oracle: the outputs of both models, in fp64. With Grams rounded to fp32 it was off by 5e-4 of the outputs."""
    dense = tiny_random("llama")
    if constant:
        with torch.no_grad():
            table = dense.module.get_input_embeddings().weight
            table.copy_(table[:1].expand_as(table).clone())
    recipe = replace(RECIPE, calibration=RandomTokens(count=4 if constant else 1, batch_size=1), sharing=NoSharing())
    compressed = compress(dense, recipe, Workspace(Cache(None), Progress(quiet=True)))
    inputs = inputs_of_every_matrix(dense, recipe.calibration.windows(dense.tokenizer).ids)
    for planned in compressed.plan.groups:
        [matrix] = [dense.architecture.by_position[planned.group.matrix, layer] for layer in planned.group.layers]
        x = inputs[matrix.module].reshape(-1, matrix.d_in).double()
        weight = dense_weight(module_of(dense.module, matrix)).double()
        kept = dense_weight(compressed.module.get_submodule(matrix.module).to_dense()).double()  # type: ignore[operator]
        measured, outputs = float((x @ (weight - kept)).norm()), float((x @ weight).norm())
        assert abs(planned.predicted_loss - measured) <= 1e-6 * outputs, planned.group.name
