"""What every layout keeps: the product, what it costs to the last number, and costs that grow with the rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from bs_exp.models.architecture import weight_of
from bs_exp.models.modeling_basis_sharing import LAYOUTS
from bs_exp.models.surgery import replace_matrices, to_dense, twin
from bs_exp.models.tiny import tiny_random
from bs_exp.protocols import ArrangesAlike, Layout
from bs_exp.types import Architecture, LoadedModel, SharedFactors, WeightGroup

FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2"])
CORRECTIONS = pytest.mark.parametrize("correction", [0, 2])
# A suite runs for several subclasses, with a strategy that does not change between examples.
_SHARED = [HealthCheck.differing_executors, HealthCheck.function_scoped_fixture]


class LayoutContract:
    """Subclass it as `TestMine`, with a fixture `layout` that returns the strategy."""

    @pytest.fixture(scope="class")
    @classmethod
    def layout(cls) -> Layout:
        """The strategy."""
        raise NotImplementedError("override the fixture `layout`: it returns the strategy.")

    @settings(max_examples=60, deadline=None, suppress_health_check=_SHARED)
    @given(d_in=st.integers(2, 40), d_out=st.integers(2, 40), size=st.integers(1, 5), correction=st.integers(0, 3))
    def test_costs_grow_with_the_rank(self, layout: Layout, d_in: int, d_out: int, size: int, correction: int) -> None:
        group = WeightGroup("q", tuple(range(size)), d_in, d_out, correction)
        costs = [layout.parameters(group, rank) for rank in range(1, group.full_rank + 1)]
        assert all(isinstance(cost, int) for cost in costs)
        assert all(less < more for less, more in pairwise(costs))
        assert costs[0] > group.correction_parameters

    @FAMILIES
    @CORRECTIONS
    def test_products_are_those_of_the_factors(self, layout: Layout, family: str, correction: int) -> None:
        """Oracle: the definition, `basis @ coefficients`, and each layer's own correction."""
        dense = tiny_random(family)
        dense.module.double()
        restored = to_dense(stored(dense, layout, correction))
        for shared in random_factors(dense.architecture, correction):
            for layer in shared.group.layers:
                expected = shared.basis @ shared.coefficients[layer]
                if shared.corrections:
                    down, up = shared.corrections[layer]
                    expected += down @ up
                found = weight_of(restored, dense.architecture.by_position[shared.group.matrix, layer])
                torch.testing.assert_close(found.detach(), expected, rtol=1e-8, atol=1e-8)

    @FAMILIES
    @CORRECTIONS
    def test_costs_are_the_numbers_that_are_stored(self, layout: Layout, family: str, correction: int) -> None:
        """In bytes at 16 bits, saved buffers and all; bits that fill no whole number are rounded up, by layer."""
        dense = tiny_random(family)
        module = stored(dense, layout, correction).bfloat16()
        for shared in random_factors(dense.architecture, correction):
            group = shared.group
            positions = [dense.architecture.by_position[group.matrix, layer] for layer in group.layers]
            tensors = {
                tensor.data_ptr(): tensor.nbytes
                for position in positions
                for name, tensor in module.get_submodule(position.module).state_dict().items()
                if not name.endswith("bias") and tensor.numel()
            }
            cost = 2 * layout.parameters(group, shared.rank)
            assert cost - group.size <= sum(tensors.values()) <= cost, group.name

    def test_factors_arranged_like_others_have_their_own_products(self, layout: Layout) -> None:
        """Like close ones, and like ones that nothing relates them to; only for a layout that can."""
        if not isinstance(layout, ArrangesAlike):
            pytest.skip(f"{layout.name} arranges all factors anew")
        for shared in random_factors(tiny_random().architecture, correction=2):
            close = replace(shared, basis=shared.basis + 1e-3 * shared.basis.roll(1, 0))
            for like in (close, replace(shared, basis=shared.basis.flip(0), coefficients=_flipped(shared))):
                found = layout.restore(layout.arrange_like(shared, layout.arrange(like)))
                for layer, coefficients in shared.coefficients.items():
                    product = found.basis @ found.coefficients[layer]
                    torch.testing.assert_close(product, shared.basis @ coefficients, rtol=1e-8, atol=1e-8)
                assert found.corrections.keys() == shared.corrections.keys()
                for layer, terms in shared.corrections.items():
                    assert all(map(torch.equal, found.corrections[layer], terms))

    def test_same_in_same_out_and_the_factors_are_untouched(self, layout: Layout) -> None:
        shared, again = (next(random_factors(tiny_random().architecture, correction=2)) for _ in range(2))
        first, second = layout.arrange(shared), layout.arrange(shared)
        assert first.group == second.group == shared.group and first.rank == shared.rank
        assert torch.equal(first.basis, second.basis) and torch.equal(shared.basis, again.basis)
        for layer in shared.group.layers:
            assert torch.equal(first.coefficients[layer], second.coefficients[layer])
            assert torch.equal(shared.coefficients[layer], again.coefficients[layer])

    @CORRECTIONS
    def test_restored_factors_have_the_same_product(self, layout: Layout, correction: int) -> None:
        """In fp64, from factors of any dtype; and they have the shapes that the class of the layers states."""
        for shared in random_factors(tiny_random().architecture, correction):
            stored, group = layout.arrange(shared), shared.group
            shapes = LAYOUTS[layout.name](group.size).shapes(group.d_in, group.d_out, shared.rank)
            assert stored.layout is layout and stored.rank == shared.rank
            assert stored.basis.shape == shapes.basis[::-1]
            assert {tuple(rows.shape) for rows in stored.coefficients.values()} == {shapes.weight[::-1]}
            kept = {name: (tuple(value.shape), value.dtype) for name, value in stored.kept.items()}
            assert kept == shapes.kept
            again = layout.restore(replace(stored, basis=stored.basis.float()))
            assert again.basis.dtype is torch.float64
            assert again.basis.shape == shared.basis.shape and again.corrections.keys() == shared.corrections.keys()
            for layer, rows in shared.coefficients.items():
                found = again.basis @ again.coefficients[layer]
                torch.testing.assert_close(found, shared.basis @ rows, rtol=1e-5, atol=1e-5)

    def test_new_coefficients_of_one_layer_leave_the_others_their_bits(self, layout: Layout) -> None:
        for shared in random_factors(tiny_random().architecture, correction=2):
            stored = layout.arrange(shared)
            present = layout.restore(stored)
            first, *others = shared.group.layers
            new = 2.0 * present.coefficients[first] + 1.0
            changed = layout.with_coefficients(stored, {first: new})
            found, expected = layout.restore(changed), present.basis @ new
            torch.testing.assert_close(found.basis @ found.coefficients[first], expected, rtol=1e-8, atol=1e-8)
            for layer in others:
                assert torch.equal(changed.basis, stored.basis)
                assert torch.equal(changed.coefficients[layer], stored.coefficients[layer])


def random_factors(architecture: Architecture, correction: int = 0) -> Iterator[SharedFactors]:
    """Factors of another rank for every group: pairs of layers, and the layer left over, which needs no correction."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return 0.2 * torch.randn(*shape, generator=random, dtype=torch.float64)

    for index, matrix in enumerate(architecture.matrix_types):
        for members in (architecture.of_type(matrix)[:2], architecture.of_type(matrix)[2:]):
            layers, own = tuple(m.place for m in members), correction if len(members) > 1 else 0
            group = WeightGroup(matrix, layers, members[0].d_in, members[0].d_out, own)
            rank = 3 + 2 * index
            yield SharedFactors(
                group,
                normal(group.d_in, rank),
                {layer: normal(rank, group.d_out) for layer in layers},
                {layer: (normal(group.d_in, own), normal(own, group.d_out)) for layer in layers if own},
            )


def stored(dense: LoadedModel, layout: Layout, correction: int) -> PreTrainedModel:
    """The model with random factors in place of every matrix."""
    module = twin(dense.module)
    replace_matrices(module, dense.architecture, random_factors(dense.architecture, correction), layout)
    return module


def _flipped(shared: SharedFactors) -> dict[int, Tensor]:
    return {layer: coefficients.flip(1) for layer, coefficients in shared.coefficients.items()}
