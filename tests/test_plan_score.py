"""Scores are what the formulas say of the full logits, and cost one forward pass of the compressed model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bs_exp.cache import Cache
from bs_exp.errors import ConfigError
from bs_exp.factorization.factors import Decompositions, decompose_groups
from bs_exp.factorization.spectra import GroupMeasures
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.models.architecture import find_architecture
from bs_exp.models.model_inputs import IGNORED, feeder
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress
from bs_exp.plan_score import Comparison, PlanScore, check_measurable, spread_windows
from bs_exp.progress import Progress
from bs_exp.protocols import OBJECTIVES, PlanObjective
from bs_exp.sharing.none import singles
from bs_exp.types import CalibrationData, LoadedModel, PlannedGroup, RankPlan, Task, TokenWindows, WeightGroup
from bs_exp.workspace import Workspace
from tests.support.recipes import RECIPE, RandomTokens

QUIET = Progress(quiet=True)
# Heads of every kind: one matrix; behind a cap; tied and scaled; behind further layers; none.
FAMILIES = ["llama", "gpt2", "gemma2", "bert", "t5", "bert_encoder"]


def model_of(family: str) -> LoadedModel:
    if family != "bert_encoder":
        return tiny_random(family)
    whole = tiny_random("bert")
    trunk = whole.module.base_model
    return replace(whole, module=trunk, architecture=find_architecture(trunk), task=Task.ENCODER)


def windows(count: int = 5) -> TokenWindows:
    return RandomTokens(count=count).windows(None)


def comparison(dense: LoadedModel, objective: str, count: int | None = None) -> Comparison:
    return Comparison(
        dense=dense,
        data=CalibrationData(windows(), batch_size=2),
        objective=PlanObjective(objective=objective, num_windows=count),
    )


def oracle(dense: LoadedModel, module: Any, objective: str, ids: Tensor) -> float:
    """From the definition: all outputs of both models at once, probabilities in fp64."""
    with torch.no_grad():
        if dense.task is Task.ENCODER:
            ours, theirs = (model(input_ids=ids).last_hidden_state.double() for model in (module, dense.module))
            counted = torch.ones_like(ids, dtype=torch.bool)
        else:
            examples = feeder(dense).examples(ids)
            counted = examples.labels != IGNORED
            ours, theirs = (model(**examples.inputs).logits.double() for model in (module, dense.module))
    ours, theirs = ours[counted], theirs[counted]
    if objective == "cosine":
        cosine = (ours * theirs).sum(-1) / (ours.square().sum(-1).sqrt() * theirs.square().sum(-1).sqrt())
        return float((1 - cosine).mean())
    q = ours.exp() / ours.exp().sum(-1, keepdim=True)
    if objective == "perplexity":
        return float(-q.log().gather(1, examples.labels[counted][:, None]).mean())
    p = theirs.exp() / theirs.exp().sum(-1, keepdim=True)
    return float((p * (p / q).log()).sum(-1).mean())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_objective_is_what_its_formula_says_of_the_outputs(family: str, objective: str) -> None:
    dense = model_of(family)
    made = compress(dense, RECIPE, Workspace(Cache(None), QUIET))
    judge = comparison(dense, objective)
    if dense.task is Task.ENCODER and objective != "cosine":
        with pytest.raises(ConfigError, match=rf"objective={objective} needs logits"):
            check_measurable(dense, judge.objective, judge.data.windows)
        return
    check_measurable(dense, judge.objective, judge.data.windows)
    assert judge.measure(made.module) == pytest.approx(
        oracle(dense, made.module, objective, judge.data.windows.ids), rel=2e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_model_is_no_way_from_itself(family: str) -> None:
    dense = model_of(family)
    assert comparison(dense, "cosine").measure(dense.module) == pytest.approx(0.0, abs=1e-6)
    if dense.task is not Task.ENCODER:
        assert comparison(dense, "kl").measure(dense.module) == pytest.approx(0.0, abs=1e-6)


def test_running_values_are_those_of_the_first_windows() -> None:
    dense = tiny_random()
    module = compress(dense, RECIPE, Workspace(Cache(None), QUIET)).module
    judge = comparison(dense, "kl")
    found = list(judge.running(module))
    assert found == pytest.approx(
        [oracle(dense, module, "kl", judge.data.windows.ids[:count]) for count in (2, 4, 5)], rel=1e-4
    )
    assert judge.measure(module) == found[-1]


def test_windows_are_spread_over_all_of_them() -> None:
    ids = torch.arange(9)[:, None]
    given = TokenWindows(ids=ids, provenance={})
    assert spread_windows(given, 3).flatten().tolist() == [0, 4, 8]
    assert spread_windows(given, None) is ids and spread_windows(given, 9) is ids
    with pytest.raises(ConfigError, match=r"num_windows must be at most .*5, got 6"):
        check_measurable(tiny_random(), PlanObjective(objective="kl", num_windows=6), windows(5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "bleu", "num_windows": 4}, "objective must be one of cosine, perplexity, kl, got 'bleu'"),
        ({"objective": "kl", "num_windows": 0}, "num_windows must be a whole number of at least 1, got 0"),
    ],
)
def test_objectives_that_do_not_exist(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PlanObjective(**settings)


def test_outputs_that_are_not_finite_are_infinitely_far() -> None:
    dense = tiny_random()
    judge = comparison(dense, "kl")
    module = compress(dense, RECIPE, Workspace(Cache(None), QUIET)).module
    with torch.no_grad():
        module.get_submodule("model.layers.0.mlp.up_proj").weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
    assert judge.measure(module) == float("inf")


@pytest.mark.parametrize(("family", "times"), [("llama", 1), ("gemma2", 2)])
def test_the_dense_model_runs_once_where_its_hidden_states_say_all(family: str, times: int) -> None:
    dense = tiny_random(family)
    module = compress(dense, RECIPE, Workspace(Cache(None), QUIET)).module
    judge, passes = comparison(dense, "kl"), []
    first = judge.measure(module)
    handle = dense.module.register_forward_hook(lambda *_: passes.append(1))
    trunk = dense.module.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    assert judge.measure(module) == first
    handle.remove()
    trunk.remove()
    # Three batches; a model that computes logits passes through its trunk, and is counted twice.
    assert len(passes) == (0 if times == 1 else 6)


@pytest.fixture(scope="module")
def prepared() -> tuple[LoadedModel, tuple[WeightGroup, ...], GroupMeasures, Decompositions, Cache]:
    dense, cache = tiny_random(), Cache(None)
    groups = singles(dense.architecture)
    measures = GroupMeasures(
        dense=dense,
        current=dense,
        data=CalibrationData(RECIPE.calibration.windows(dense.tokenizer), RECIPE.calibration.batch_size),
        needs=RECIPE.metric_needs,
        whitening=RECIPE.whitening,
        importance=RECIPE.importance,
        workspace=Workspace(cache, QUIET),
    )
    return dense, groups, measures, decompose_groups(groups, measures), cache


def plan_of(ranks: Mapping[WeightGroup, int | None]) -> RankPlan:
    return RankPlan(
        groups=tuple(PlannedGroup(g, rank, g.parameters, 0.0, 0.0) for g, rank in ranks.items()), requested_ratio=0.5
    )


def test_a_plan_scores_as_the_model_that_it_makes(prepared: Any) -> None:
    dense, groups, measures, decompositions, _ = prepared
    for layout in (RECIPE.layout, PivotedLayout()):
        recipe = replace(RECIPE, sharing=type(RECIPE.sharing)(matrices=("q",), group_size=1), layout=layout)
        made = compress(dense, recipe, Workspace(Cache(None), QUIET))
        judge = comparison(dense, "kl")
        keys = {group: measures.key(group) for group in groups}
        score = PlanScore(
            comparison=judge,
            decompositions=decompositions,
            keys=keys,
            identity={},
            workspace=Workspace(Cache(None), QUIET),
        )
        assert score(made.plan) == pytest.approx(judge.measure(made.module), rel=1e-4)
        *_, last = score.running(made.plan)
        assert last == score(made.plan)


def test_scores_are_kept_by_what_they_depend_on(prepared: Any) -> None:
    dense, groups, measures, decompositions, _ = prepared
    keys, cache = {group: measures.key(group) for group in groups}, Cache(None)

    def score(plan: RankPlan, **changes: Any) -> float:
        judge = replace(comparison(dense, "kl"), **changes)
        return PlanScore(
            comparison=judge, decompositions=decompositions, keys=keys, identity={}, workspace=Workspace(cache, QUIET)
        )(plan)

    ranks: dict[WeightGroup, int | None] = dict.fromkeys(groups, None)
    one, other = plan_of({**ranks, groups[0]: 4}), plan_of({**ranks, groups[0]: 5})
    first = score(one)
    assert (cache.hits["score"], cache.misses["score"]) == (0, 1)
    assert score(one) == first and cache.hits["score"] == 1
    values = {
        first,
        score(other),
        score(plan_of({**ranks, groups[1]: 4})),
        score(one, objective=PlanObjective(objective="cosine", num_windows=None)),
        score(one, objective=PlanObjective(objective="kl", num_windows=2)),
        score(one, data=CalibrationData(RandomTokens(seed=1, count=5).windows(None), batch_size=2)),
    }
    assert len(values) == 6 and cache.hits["score"] == 1


def test_an_interrupted_score_is_not_kept(prepared: Any) -> None:
    dense, groups, measures, decompositions, _ = prepared
    cache = Cache(None)
    score = PlanScore(
        comparison=comparison(dense, "kl"),
        decompositions=decompositions,
        keys={group: measures.key(group) for group in groups},
        identity={},
        workspace=Workspace(cache, QUIET),
    )
    plan = plan_of({group: 4 for group in groups})
    next(score.running(plan))
    assert len(list(score.running(plan))) == 3 and cache.hits["score"] == 0
