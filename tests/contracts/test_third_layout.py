"""A third layout is one strategy, one class of layers and one row: nothing else knows how factors are stored.

This one sorts the inputs by what the basis makes of them, and keeps their order beside the factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bs_exp.cache import Cache
from bs_exp.errors import DecompositionError, ModelError
from bs_exp.evaluation.size import measure_size
from bs_exp.models.modeling_basis_sharing import LAYOUTS, FactorisedLinear, LinearMap, Shapes
from bs_exp.models.saving import save_model
from bs_exp.models.surgery import factors_of, find_factors, replace_matrices, to_dense, twin
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress
from bs_exp.protocols import StoredFactors
from bs_exp.sharing.residual import ResidualSharing
from bs_exp.testing.models import QUIET, recipe
from bs_exp.types import CompressedModel, LoadedModel, SharedFactors, WeightGroup
from bs_exp.update.none import NoUpdate
from bs_exp.update.refit import Refit
from bs_exp.workspace import Workspace
from tests.support.factorised import logits_of, random_factors
from tests.support.updates import RECOVERY

REFIT = Refit(
    mode="one_shot",
    inputs="compressed",
    target="compressed_inputs",
    beta=None,
    gram="group",
    ridge=1e-6,
    below=None,
)


@dataclass(frozen=True, kw_only=True)
class SortedLayout:
    """The rows of the basis by falling norm. Their order is 64-bit numbers, counted as four of 16 bits each."""

    name: ClassVar[str] = "sorted"

    def parameters(self, group: WeightGroup, rank: int) -> int:
        order = 4 * group.size * group.d_in
        return rank * (group.d_in + group.columns) + order + group.correction_parameters

    def arrange(self, factors: SharedFactors) -> StoredFactors:
        order = factors.basis.norm(dim=1).argsort(descending=True)
        return StoredFactors(
            self, factors.group, factors.basis[order], factors.coefficients, {"order": order}, factors.corrections
        )

    def restore(self, stored: StoredFactors) -> SharedFactors:
        basis = stored.basis[stored.kept["order"].argsort()]
        return SharedFactors(stored.group, basis, stored.coefficients, stored.corrections).double()

    def with_coefficients(self, stored: StoredFactors, coefficients: Mapping[int, Tensor]) -> StoredFactors:
        return replace(stored, coefficients={**stored.coefficients, **coefficients})


class SortedLinear(FactorisedLinear):
    """`y = (x[order] @ basis^T) @ weight^T` plus bias."""

    bias_name = "bias"
    bias: nn.Parameter | None
    order: Tensor

    @classmethod
    def shapes(cls, d_in: int, d_out: int, rank: int) -> Shapes:
        return Shapes((rank, d_in), (d_out, rank), {"order": ((d_in,), torch.int64)})

    @property
    def in_features(self) -> int:
        return self.basis.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def through(self, x: Tensor, basis: LinearMap, weight: LinearMap) -> Tensor:
        y = weight(basis(x[..., self.order]))
        return y if self.bias is None else y + self.bias

    def product(self) -> Tensor:
        basis, weight = self._precise()
        return weight @ basis[:, self.order.argsort()]


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row in the table of the shipped file."""
    monkeypatch.setitem(LAYOUTS, SortedLayout.name, lambda members: SortedLinear)


def factors(dense: LoadedModel) -> Iterator[SharedFactors]:
    return random_factors(dense.architecture)


def compressed(dense: LoadedModel, update: object) -> CompressedModel:
    sharing = ResidualSharing(matrices=("q", "k", "v", "up"), group_size=2, residual_rank=2)
    asked = replace(recipe(update, layout=SortedLayout()), sharing=sharing)
    return compress(dense, asked, Workspace(Cache(None), QUIET))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_it_is_put_into_a_model_and_read_back(family: str) -> None:
    dense, layout = tiny_random(family), SortedLayout()
    plain, made = twin(dense.module), twin(dense.module)
    replace_matrices(made, dense.architecture, factors(dense), layout)
    for shared in factors(dense):
        for layer, rows in shared.coefficients.items():
            matrix = dense.architecture.by_position[shared.group.matrix, layer]
            layer_of = made.get_submodule(matrix.module)
            assert isinstance(layer_of, SortedLinear)
            torch.testing.assert_close(layer_of.product().T, (shared.basis @ rows).float())
        stored = factors_of(made, dense.architecture, shared.group)
        assert stored.layout is layout and stored.rank == shared.rank
        torch.testing.assert_close(layout.restore(stored).basis, shared.basis, rtol=1e-6, atol=1e-6)
    restored = to_dense(made)
    torch.testing.assert_close(logits_of(restored), logits_of(made), rtol=1e-4, atol=5e-5)
    assert [type(m) for m in restored.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("update", [NoUpdate(), REFIT], ids=["none", "refit"])
def test_it_goes_through_the_pipeline_and_a_folder(update: object, tmp_path: Path) -> None:
    dense, layout = tiny_random(), SortedLayout()
    made = compressed(dense, update)
    assert made.plan.layout == "sorted" and made.plan.retain_ratio <= 0.5
    sizes = measure_size(dense, made, made.plan)
    orders = sum(4 * g.group.size * g.group.d_in for g in made.plan.groups if g.rank is not None)
    assert sizes["targeted_parameters"] == made.plan.parameters - orders  # as bits of pivots, they are no Parameters
    if update is REFIT:
        assert made.update["loss_after"] < made.update["loss_before"]
    loaded = AutoModelForCausalLM.from_pretrained(save_model(made.module, dense.tokenizer, tmp_path / "model"))
    assert torch.equal(logits_of(loaded), logits_of(made.module))
    group = next(g.group for g in made.plan.groups if g.rank is not None)
    with pytest.raises(ModelError, match=r"names its layout \('sorted'\) and no more"):
        factors_of(loaded, dense.architecture, group)
    there, here = (factors_of(module, dense.architecture, group, layout) for module in (loaded, made.module))
    assert torch.equal(layout.restore(there).basis, layout.restore(here).basis)


def test_its_factors_can_be_trained() -> None:
    dense = tiny_random()
    made = compressed(dense, replace(RECOVERY, steps=2))
    assert made.update["steps"] == 2
    numbers = sum(factor.numel() for factor in find_factors(made.module).values())
    assert numbers == measure_size(dense, made, made.plan)["targeted_parameters"]


def test_without_its_row_a_folder_is_refused_by_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_random()
    made = twin(dense.module)
    replace_matrices(made, dense.architecture, factors(dense), SortedLayout())
    made.save_pretrained(tmp_path)
    monkeypatch.delitem(LAYOUTS, "sorted")
    with pytest.raises(ValueError, match="layout must be one of plain, pivoted, got 'sorted'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_it_keeps_must_fit_the_class() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Forgetful(SortedLayout):
        def arrange(self, factors: SharedFactors) -> StoredFactors:
            return replace(super().arrange(factors), kept={})

    dense = tiny_random()
    with pytest.raises(DecompositionError, match=r"What the layout 'sorted' keeps for group .* does not fit"):
        replace_matrices(twin(dense.module), dense.architecture, factors(dense), Forgetful())
