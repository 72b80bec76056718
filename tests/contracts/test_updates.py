"""What every update keeps: only factors change, what is shared stays shared, in every layout, and to the same bits."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from bs_exp.cache import Cache
from bs_exp.evaluation.size import measure_size
from bs_exp.models.modeling_basis_sharing import FactorisedLinear, SharedLinear, pivoted_kind
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress
from bs_exp.protocols import Layout
from bs_exp.training.objectives import find_factors
from bs_exp.types import CompressedModel, LoadedModel
from bs_exp.update.none import NoUpdate
from bs_exp.workspace import Workspace
from tests.support.options import option_of, options, strategy
from tests.support.updates import LAYOUTS, QUIET, Tokens, recipe, same, updated, values

# A few steps of training, large enough to be seen.
TRAINING = "{0}.steps=3 {0}.batch_size=4 {0}.evaluate_every=3 {0}.learning_rate=0.02 {0}.holdout=0.2"
ROWS = [
    "update=none",
    "update=refit",
    "update=refit update.mode=sequential update.gram=layer update.target=dense_outputs",
    "update=own_gram",
    "update=mixed_refit",
    f"update=lora update.rank=3 {TRAINING.format('update')}",
    # A rank above the factors' sides, and a text of its own: this one.
    f"update=lora_corpus update.rank=40 {TRAINING.format('update')} +calibration=python_docs"
    f" corpus@update.data.corpus=text update.data.corpus.files=['{Path(__file__)}'] update.data.sequence_length=24"
    " update.data.num_sequences=12",
    f"update=recover {TRAINING.format('update')}",
    f"update=refit_recover {TRAINING.format('update.updates.recover')}",
]
EVERY = pytest.mark.parametrize("row", ROWS, ids=[row[:30] for row in ROWS])
IN_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


@cache
def dense() -> LoadedModel:
    return tiny_random()


@cache
def statistics() -> Cache:
    """Grams and decompositions, which are the same for all."""
    return Cache(None)


@cache
def plain(layout: Layout) -> CompressedModel:
    return updated(dense(), NoUpdate(), statistics(), layout=layout)


@cache
def made(row: str, layout: Layout) -> CompressedModel:
    return updated(dense(), strategy(row), statistics(), layout=layout)


def test_every_option_has_a_row() -> None:
    assert {option_of(row) for row in ROWS} == options("update")


@EVERY
@IN_LAYOUTS
def test_factors_change_and_nothing_else(row: str, layout: Layout) -> None:
    """Which columns are pivots is a part of the factors; what is no factor is the dense model's own Parameter."""
    module, original = made(row, layout).module, dense().module
    before, after = values(plain(layout).module), values(module)
    assert before.keys() == after.keys() and same(values(original), values(tiny_random().module))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {name for name, layer in module.named_modules() if isinstance(layer, FactorisedLinear)}
    assert all(name.rpartition(".")[0] in layers for name in changed)
    assert bool(changed) == (option_of(row) != "none")
    factors = {id(factor) for factor in find_factors(module).values()}
    untouched = dict(original.named_parameters(remove_duplicate=False))
    named = module.named_parameters(remove_duplicate=False)
    assert all(p is untouched[name] for name, p in named if p.numel() and id(p) not in factors)
    assert all(p.requires_grad and p.grad is None for model in (module, original) for p in model.parameters())


@EVERY
@IN_LAYOUTS
def test_who_shares_still_shares_and_nothing_more_is_stored(row: str, layout: Layout) -> None:
    """Which layers hold one basis, of which kind they are, and how many numbers that takes."""

    def held(model: CompressedModel) -> list[tuple[str, type, str]]:
        first: dict[int, str] = {}
        kinds = ((n, m) for n, m in model.module.named_modules() if isinstance(m, FactorisedLinear))
        return [(name, type(layer), first.setdefault(id(layer.basis), name)) for name, layer in kinds]

    found = held(made(row, layout))
    assert found == held(plain(layout)) and len({name for _, _, name in found}) < len(found)
    members = Counter(first for _, _, first in found)
    kinds = {
        first: pivoted_kind(count) if layout.name == "pivoted" else SharedLinear for first, count in members.items()
    }
    assert all(kind is kinds[first] for _, kind, first in found)
    assert made(row, layout).plan == plain(layout).plan
    sizes = [measure_size(dense(), model, model.plan) for model in (made(row, layout), plain(layout))]
    assert sizes[0] == sizes[1]


@EVERY
@IN_LAYOUTS
def test_same_bits_twice_and_a_report_of_plain_data(row: str, layout: Layout) -> None:
    again = updated(dense(), strategy(row), statistics(), layout=layout)
    assert same(values(again.module), values(made(row, layout).module))
    first, second = (model.update for model in (again, made(row, layout)))
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    assert _timeless(first) == _timeless(second)
    assert bool(first) == (option_of(row) != "none")


@EVERY
def test_a_check_changes_nothing(row: str) -> None:
    strategy(row).check(dense(), Tokens().data())
    assert same(values(dense().module), values(tiny_random().module))


@EVERY
def test_a_model_without_factors_stays_as_it_is(row: str) -> None:
    found = compress(dense(), replace(recipe(strategy(row)), retain_ratio=1.0), Workspace(statistics(), QUIET))
    assert same(values(found.module), values(dense().module))
    assert json.loads(json.dumps(found.update, allow_nan=False)) == found.update


def _timeless(report: object) -> object:
    """A report without what a clock says."""
    if not isinstance(report, dict):
        return report
    return {key: _timeless(value) for key, value in report.items() if not key.startswith("seconds")}
