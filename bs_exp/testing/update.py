"""What every update keeps: what may change, what is shared stays shared, in every layout, and to the same bits."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch

from bs_exp.cache import Cache
from bs_exp.evaluation.size import measure_size
from bs_exp.models.modeling_basis_sharing import FactorisedLinear, SharedLinear, pivoted_kind
from bs_exp.models.surgery import find_factors
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress
from bs_exp.protocols import Layout, Update
from bs_exp.testing.models import LAYOUTS, QUIET, Tokens, recipe, same, updated, values
from bs_exp.types import CompressedModel, LoadedModel
from bs_exp.update.none import NoUpdate
from bs_exp.workspace import Workspace


class UpdateContract:
    """Subclass it as `TestMine`, with a fixture `update` that returns the strategy."""

    @pytest.fixture(scope="class")
    @classmethod
    def update(cls) -> Update:
        """The strategy."""
        raise NotImplementedError("override the fixture `update`: it returns the strategy.")

    @pytest.fixture(scope="class", params=LAYOUTS, ids=lambda layout: layout.name)
    @classmethod
    def layout(cls, request: pytest.FixtureRequest) -> Layout:
        """Every layout."""
        found: Layout = request.param
        return found

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, update: Update, layout: Layout) -> CompressedModel:
        """The tiny model at half its parameters, with the update."""
        return updated(dense(), update, statistics(), layout=layout)

    def changes_factors(self, update: Update) -> bool:
        """Whether the update does anything, and reports it."""
        return True

    def changes_blocks(self, update: Update) -> bool:
        """Whether it changes other parameters of blocks too, of which the compressed model then has its own."""
        return False

    def test_factors_change_and_nothing_else(self, update: Update, layout: Layout, made: CompressedModel) -> None:
        """Which columns are pivots is a part of the factors; what is no factor is the dense model's own Parameter, or
        one of a block that changed."""
        module, original = made.module, dense().module
        before, after = values(plain(layout.name).module), values(module)
        assert before.keys() == after.keys() and same(values(original), values(tiny_random().module))
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        layers = {name for name, layer in module.named_modules() if isinstance(layer, FactorisedLinear)}
        blocks = tuple(f"{path}." for path in dense().architecture.blocks) if self.changes_blocks(update) else ()
        assert all(name.rpartition(".")[0] in layers or name.startswith(blocks) for name in changed)
        assert bool(changed) == self.changes_factors(update)
        factors = {id(factor) for factor in find_factors(module).values()}
        untouched = dict(original.named_parameters(remove_duplicate=False))
        named = module.named_parameters(remove_duplicate=False)
        others = [(name, p) for name, p in named if p.numel() and id(p) not in factors]
        own = {name for name, p in others if p is not untouched[name]}
        assert all(name.startswith(blocks) for name in own) and bool(own) == self.changes_blocks(update)
        assert all(p.requires_grad and p.grad is None for model in (module, original) for p in model.parameters())

    def test_who_shares_still_shares_and_nothing_more_is_stored(self, layout: Layout, made: CompressedModel) -> None:
        """Which layers hold one basis, of which kind they are, and how many numbers that takes."""
        found = _held(made)
        assert found == _held(plain(layout.name)) and len({name for _, _, name in found}) < len(found)
        members = Counter(first for _, _, first in found)
        kinds = {
            first: pivoted_kind(count) if layout.name == "pivoted" else SharedLinear for first, count in members.items()
        }
        assert all(kind is kinds[first] for _, kind, first in found)
        assert made.plan == plain(layout.name).plan
        sizes = [measure_size(dense(), model, model.plan) for model in (made, plain(layout.name))]
        assert sizes[0] == sizes[1]

    def test_same_bits_twice_and_a_report_of_plain_data(
        self, update: Update, layout: Layout, made: CompressedModel
    ) -> None:
        """By a copy with the same settings."""
        again = updated(dense(), copy.deepcopy(update), statistics(), layout=layout)
        assert same(values(again.module), values(made.module))
        first, second = (model.update for model in (again, made))
        assert json.loads(json.dumps(first, allow_nan=False)) == first
        assert _timeless(first) == _timeless(second)
        assert bool(first) == self.changes_factors(update)

    def test_a_check_changes_nothing(self, update: Update) -> None:
        update.check(dense(), Tokens().data())
        assert same(values(dense().module), values(tiny_random().module))

    def test_a_model_without_factors_stays_as_it_is(self, update: Update) -> None:
        found = compress(dense(), replace(recipe(update), retain_ratio=1.0), Workspace(statistics(), QUIET))
        assert same(values(found.module), values(dense().module))
        assert json.loads(json.dumps(found.update, allow_nan=False)) == found.update


@cache
def dense() -> LoadedModel:
    """The tiny model."""
    return tiny_random()


@cache
def statistics() -> Cache:
    """Grams and decompositions, which are the same for all."""
    return Cache(None)


@cache
def plain(layout: str) -> CompressedModel:
    """The model without an update, in the layout of this name."""
    (known,) = (found for found in LAYOUTS if found.name == layout)
    return updated(dense(), NoUpdate(), statistics(), layout=known)


def _held(model: CompressedModel) -> list[tuple[str, type, str]]:
    """Every factorised layer by name, its class, and the first layer that holds the same basis."""
    first: dict[int, str] = {}
    kinds = ((n, m) for n, m in model.module.named_modules() if isinstance(m, FactorisedLinear))
    return [(name, type(layer), first.setdefault(id(layer.basis), name)) for name, layer in kinds]


def _timeless(report: object) -> object:
    """A report without what a clock says."""
    if not isinstance(report, dict):
        return report
    return {key: _timeless(value) for key, value in report.items() if not key.startswith("seconds")}
