"""What goes first by the sum of signed changes, and that these changes are those of the model's loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from bs_exp.allocation.first_order import FirstOrder, zero_sum_ranks
from bs_exp.cache import Cache
from bs_exp.errors import ConfigError
from bs_exp.factorization.factors import decompose_groups
from bs_exp.factorization.spectra import GroupMeasures
from bs_exp.importance.none import NoImportance
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.architecture import weight_of
from bs_exp.models.tiny import tiny_random
from bs_exp.progress import Progress
from bs_exp.protocols import AllocationProblem
from bs_exp.types import CalibrationData, Spectrum, Statistic, TokenWindows, WeightGroup
from bs_exp.whitening.gram import GramWhitening
from bs_exp.workspace import Workspace

LAYOUT = PlainLayout()


@pytest.mark.parametrize("group", [WeightGroup("o", (1,), 32, 32), WeightGroup("down", (0, 2), 48, 32)])
def test_changes_are_those_of_whitened_singular_components(group: WeightGroup) -> None:
    """Oracle: numpy's SVD of `S W` and autograd's gradient, in the formula of the paper."""
    model = tiny_random()
    ids = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))
    data = CalibrationData(TokenWindows(ids=ids, provenance={"sha256": "random"}), batch_size=2)
    measures = GroupMeasures(
        dense=model,
        current=model,
        data=data,
        needs={Statistic.GRAM, Statistic.LOSS_GRADIENT},
        whitening=GramWhitening(ridge=1e-3),
        importance=NoImportance(),
        workspace=Workspace(Cache(None), Progress(quiet=True)),
    )
    [spectrum] = decompose_groups([group], measures, LAYOUT).spectra
    assert spectrum.first_order is not None and len(spectrum.first_order) == group.full_rank

    matrices = [model.architecture.by_position[group.matrix, layer] for layer in group.layers]
    logits = model.module(ids).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, [model.module.get_submodule(m.module).weight for m in matrices])
    gradient = np.concatenate([g.double().numpy().T for g in gradients], axis=1)
    weight = np.concatenate([weight_of(model.module, m).detach().double().numpy() for m in matrices], axis=1)
    whitener = measures.metric(group).whitener
    assert whitener is not None
    s = whitener.numpy()
    left, sigma, right = np.linalg.svd(s @ weight, full_matrices=False)
    expected = -sigma * np.einsum("ij,ij->j", left, np.linalg.solve(s.T, gradient) @ right.T)
    np.testing.assert_allclose(spectrum.singular_values.numpy(), sigma, rtol=1e-6)
    np.testing.assert_allclose(spectrum.first_order.numpy(), expected, rtol=1e-3, atol=1e-6 * abs(expected).max())
    assert float(spectrum.first_order.sum()) == pytest.approx(-(gradient * weight).sum(), rel=1e-4)


def test_the_next_component_brings_the_sum_back() -> None:
    """By hand: 4 x 4, where ranks 2 and above cost as much as dense, so components 4 and 3 save nothing."""
    groups = [WeightGroup("q", (0,), 4, 4), WeightGroup("k", (0,), 4, 4)]
    changes = [[9.0, 1.0, -5.0, 2.0], [9.0, 2.0, 4.0, -3.0]]
    # Sum 0: q's +2; then k's -3 (sum -1); k's +4 (sum 3); q's -5 (sum -2); q's +1 (sum -1): q is at rank 1, 8 saved.
    assert zero_sum_ranks(groups, changes, budget=24, layout=LAYOUT) == [1, 2]
    assert zero_sum_ranks(groups, changes, budget=16, layout=LAYOUT) == [1, 1]
    assert zero_sum_ranks(groups, changes, budget=32, layout=LAYOUT) == [4, 4]
    assert zero_sum_ranks(groups, changes, budget=0, layout=LAYOUT) == [1, 1]


def test_the_sum_stays_near_zero_where_sizes_alone_would_let_it_grow() -> None:
    """Two groups that can only raise the loss, two that can only lower it by more: both kinds are dropped from."""
    generator = torch.Generator().manual_seed(0)
    signs = {"q": 1.0, "k": 1.0, "up": -1.0, "gate": -1.0}
    spectra = []
    for matrix, sign in signs.items():
        changes = sign * (1.0 + torch.rand(32, generator=generator, dtype=torch.float64)) * (5.0 if sign < 0 else 1.0)
        values = torch.linspace(2.0, 1.0, 32, dtype=torch.float64)
        group = WeightGroup(matrix, (0,), 32, 32)
        spectra.append(
            Spectrum(group=group, singular_values=values, energies=values.square(), ridge=0.0, first_order=changes)
        )
    groups = [s.group for s in spectra]
    by_group = [s.first_order.tolist() for s in spectra if s.first_order is not None]
    ranks = zero_sum_ranks(groups, by_group, budget=3500, layout=LAYOUT)
    total = sum(sum(changes[rank:]) for changes, rank in zip(by_group, ranks, strict=True))
    sizes = sum(sum(map(abs, changes[rank:])) for changes, rank in zip(by_group, ranks, strict=True))
    assert abs(total) <= 10.0 and sizes > 50.0  # 10 is the largest that one component can change
    assert min(ranks[:2]) < 32 and min(ranks[2:]) < 32
    plan = FirstOrder(order="zero_sum").allocate(AllocationProblem(tuple(spectra), 0.85, LAYOUT))
    assert plan.parameters <= 0.85 * plan.dense_parameters


def test_without_changes_it_says_what_it_needs() -> None:
    values = torch.ones(4, dtype=torch.float64)
    bare = Spectrum(group=WeightGroup("q", (0,), 4, 4), singular_values=values, energies=values, ridge=0.0)
    with pytest.raises(ValueError, match="needs"):
        FirstOrder(order="zero_sum").allocate(AllocationProblem((bare,), 0.5, LAYOUT))


def test_by_size_signs_do_not_matter() -> None:
    """Of what may go next, the least change goes: q's 1 and 2, then k's 3 and 3, and q's last one, which saves."""
    values = torch.ones(4, dtype=torch.float64)
    spectra = tuple(
        Spectrum(
            group=WeightGroup(name, (0,), 4, 4),
            singular_values=values,
            energies=values,
            ridge=0.0,
            first_order=torch.tensor(changes, dtype=torch.float64),
        )
        for name, changes in {"q": [9.0, -3.5, 2.0, -1.0], "k": [9.0, 8.0, -3.0, 3.0]}.items()
    )
    plan = FirstOrder(order="size").allocate(AllocationProblem(spectra, 0.75, LAYOUT))
    assert [planned.rank for planned in plan.groups] == [1, None]


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ConfigError, match="order must be one of zero_sum, size, got 'sum'"):
        FirstOrder(order="sum")
