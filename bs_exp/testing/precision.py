"""What every precision keeps: matrices alone are stored anew, as small as it says, and what is saved is what runs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bs_exp.cache import Cache
from bs_exp.evaluation.size import measure_size, stored_bytes
from bs_exp.models.modeling_basis_sharing import FactorisedLinear
from bs_exp.models.saving import save_model
from bs_exp.models.surgery import to_dense
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress
from bs_exp.protocols import Layout, Precision
from bs_exp.testing.models import LAYOUTS, QUIET, Tokens, recipe, same, values
from bs_exp.types import CompressedModel, LoadedModel
from bs_exp.update.none import NoUpdate
from bs_exp.workspace import Workspace


class PrecisionContract:
    """Subclass it as `TestMine`, with a fixture `precision` that returns the strategy."""

    @pytest.fixture(scope="class")
    @classmethod
    def precision(cls) -> Precision:
        """The strategy."""
        raise NotImplementedError("override the fixture `precision`: it returns the strategy.")

    @pytest.fixture(scope="class", params=LAYOUTS, ids=lambda layout: layout.name)
    @classmethod
    def layout(cls, request: pytest.FixtureRequest) -> Layout:
        """Every layout."""
        found: Layout = request.param
        return found

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, precision: Precision, layout: Layout) -> CompressedModel:
        """The tiny model at half its parameters, stored in this precision."""
        return _compressed(precision, layout)

    def quantises(self, precision: Precision) -> bool:
        """Whether the strategy does anything, and reports it."""
        return True

    def test_groups_change_and_nothing_else(self, layout: Layout, made: CompressedModel) -> None:
        """What belongs to no matrix is the dense model's own Parameter; and the dense model is as it was."""
        original = dict(_dense().module.named_parameters())
        targets = tuple(f"{matrix.module}." for matrix in _dense().architecture.matrices)
        others = {n: p for n, p in made.module.named_parameters() if not n.startswith(targets)}
        assert others and all(p is original[name] for name, p in others.items())
        assert same(values(_dense().module), values(tiny_random().module))
        assert made.plan == _plain(layout.name).plan

    def test_who_shared_a_basis_still_does(self, layout: Layout, made: CompressedModel) -> None:
        found = _held(made.module)
        assert found == _held(_plain(layout.name).module) and len(set(found.values())) < len(found)

    def test_bytes_are_those_of_the_file(
        self, precision: Precision, layout: Layout, made: CompressedModel, tmp_path: Path
    ) -> None:
        """And fewer than before; the numbers that they stand for are as many as before."""
        before, after = (measure_size(_dense(), model, model.plan) for model in (_plain(layout.name), made))
        assert after["retain_ratio"] == before["retain_ratio"] and after["parameters"] == before["parameters"]
        assert (after["targeted_bytes"] < before["targeted_bytes"]) == self.quantises(precision)
        assert after["bytes"] - after["targeted_bytes"] == before["bytes"] - before["targeted_bytes"]
        folder = save_model(made.module, _dense().tokenizer, tmp_path / "model")
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert sum(file.get_tensor(name).nbytes for name in file.keys()) == after["bytes"]  # noqa: SIM118

    def test_saved_and_loaded_it_gives_the_same_bits(self, made: CompressedModel, tmp_path: Path) -> None:
        """By plain `from_pretrained`, twice, and as a dense model up to rounding."""
        expected = _logits(made.module)
        for name in ("first", "second"):
            folder = save_model(made.module, _dense().tokenizer, tmp_path / name)
            loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
            assert torch.equal(_logits(loaded), expected)
            assert same(values(loaded), values(made.module)) and _held(loaded) == _held(made.module)
            assert stored_bytes(loaded) == stored_bytes(made.module)
            made = replace(made, module=loaded)
        torch.testing.assert_close(_logits(to_dense(made.module)), expected, rtol=1e-3, atol=1e-3)

    def test_same_bits_twice_and_a_report_of_plain_data(
        self, precision: Precision, layout: Layout, made: CompressedModel
    ) -> None:
        """By a copy with the same settings."""
        again = _compressed(copy.deepcopy(precision), layout)
        assert same(values(again.module), values(made.module))
        assert json.loads(json.dumps(again.precision, allow_nan=False)) == again.precision
        assert bool(again.precision) == self.quantises(precision)

    def test_a_model_without_factors_is_stored_so_too(self, precision: Precision, tmp_path: Path) -> None:
        found = _compressed(precision, LAYOUTS[0], retain_ratio=1.0)
        sizes = measure_size(_dense(), found, found.plan)
        assert sizes["retain_ratio"] == 1.0
        assert (sizes["targeted_bytes"] < sizes["dense_targeted_bytes"]) == self.quantises(precision)
        folder = save_model(found.module, _dense().tokenizer, tmp_path / "model")
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(_logits(loaded), _logits(found.module))

    def test_a_check_changes_nothing(self, precision: Precision) -> None:
        precision.check(_dense(), Tokens().data())
        assert same(values(_dense().module), values(tiny_random().module))


@cache
def _dense() -> LoadedModel:
    return tiny_random()


@cache
def _statistics() -> Cache:
    """Grams and decompositions, which are the same for all."""
    return Cache(None)


@cache
def _plain(layout: str) -> CompressedModel:
    """The model in its own dtype, in the layout of this name."""
    (known,) = (found for found in LAYOUTS if found.name == layout)
    return compress(_dense(), recipe(NoUpdate(), known), Workspace(_statistics(), QUIET))


def _compressed(precision: Precision, layout: Layout, retain_ratio: float = 0.5) -> CompressedModel:
    asked = replace(recipe(NoUpdate(), layout), precision=precision, retain_ratio=retain_ratio)
    return compress(_dense(), asked, Workspace(_statistics(), QUIET))


def _held(module: PreTrainedModel) -> dict[str, str]:
    """Every factorised layer by name, and the first one that holds the same basis."""
    first: dict[int, str] = {}
    layers = ((n, m) for n, m in module.named_modules() if isinstance(m, FactorisedLinear))
    return {name: first.setdefault(id(layer.basis), name) for name, layer in layers}


@torch.no_grad()
def _logits(module: PreTrainedModel) -> Tensor:
    found: Tensor = module(Tokens().windows(None).ids[:2]).logits
    return found
