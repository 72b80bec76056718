"""What every whitening keeps: a usable metric, the optimum in it, same in same out, and the formulas of the papers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bs_exp.errors import ConfigError, DecompositionError
from bs_exp.linalg.decomposition import decompose, truncate
from bs_exp.protocols import Whitening
from bs_exp.testing import WhiteningContract
from bs_exp.testing.whitening import GROUPS, inputs, normal, statistics, whitener_of
from bs_exp.types import WeightGradient, WeightGroup
from bs_exp.whitening.block_diagonal import BlockDiagonalWhitening
from bs_exp.whitening.diagonal import DiagonalWhitening
from bs_exp.whitening.fisher_rows import FisherRowsWhitening
from bs_exp.whitening.gram import GramWhitening
from bs_exp.whitening.identity import IdentityWhitening
from bs_exp.whitening.two_sided import TwoSidedWhitening
from tests.support.options import strategies

STRATEGIES: list[Whitening] = [
    IdentityWhitening(),
    GramWhitening(ridge=1e-6),
    DiagonalWhitening(alpha=0.5, size="mean", epsilon=1e-6),
    DiagonalWhitening(alpha=1.0, size="max", epsilon=1e-3),
    FisherRowsWhitening(ridge=1e-6),
    BlockDiagonalWhitening(blocks=3, ridge=1e-6),
    BlockDiagonalWhitening(blocks=100, ridge=1e-6),
    TwoSidedWhitening(ridge=1e-6, damping=1e-4, temper=1.0),
    TwoSidedWhitening(ridge=1e-6, damping=1e-4, temper=1.0, curvature="sampled"),
    TwoSidedWhitening(ridge=1e-6, damping=1e-4, temper=1.0, curvature="top_k"),
    TwoSidedWhitening(ridge=1e-6, damping=1e-4, temper=1.0, curvature="probes", probes=3),
]


class TestWhitenings(WhiteningContract):
    @pytest.fixture(scope="class", params=STRATEGIES, ids=repr)
    @classmethod
    def whitening(cls, request: pytest.FixtureRequest) -> Any:
        return request.param


def test_every_option_is_among_them() -> None:
    assert strategies("whitening") == {type(strategy) for strategy in STRATEGIES}


@pytest.mark.parametrize("size", ["mean", "max"])
def test_diagonal_is_asvds_scaling(size: str) -> None:
    group = GROUPS[1]
    columns = inputs(group).abs().T.tolist()
    sizes = [sum(c) / len(c) if size == "mean" else max(c) for c in columns]
    found = DiagonalWhitening(alpha=0.7, size=size, epsilon=1e-6).metric(statistics(group))
    torch.testing.assert_close(whitener_of(found), torch.diag(torch.tensor([s**0.7 + 1e-6 for s in sizes]).double()))


@pytest.mark.parametrize("size", ["mean", "max"])
def test_diagonal_with_alpha_zero_is_plain_svd(size: str) -> None:
    group, weight = GROUPS[0], normal(20, 12)
    plain = truncate(decompose(group, weight, IdentityWhitening().metric(statistics(group))), 5)
    scaled = DiagonalWhitening(alpha=0.0, size=size, epsilon=1e-6).metric(statistics(group))
    torch.testing.assert_close(whitener_of(scaled), (1 + 1e-6) * torch.eye(20).double())
    found = truncate(decompose(group, weight, scaled), 5)
    torch.testing.assert_close(found.basis @ found.coefficients[0], plain.basis @ plain.coefficients[0])


def test_fisher_rows_is_fwsvds_weighting() -> None:
    """`D^-1 [D W]_k` with D from the definition, by a full SVD."""
    group, weight = GROUPS[0], normal(20, 12)
    given = statistics(group)
    assert given.weight_gradient is not None
    d = torch.diag(given.weight_gradient.rows.sqrt())
    u, s, v = torch.linalg.svd(d @ weight, full_matrices=False)
    expected = torch.linalg.inv(d) @ (u[:, :5] * s[:5]) @ v[:5]
    found = truncate(decompose(group, weight, FisherRowsWhitening(ridge=1e-12).metric(given)), 5)
    torch.testing.assert_close(found.basis @ found.coefficients[0], expected, rtol=1e-5, atol=1e-6)


def test_a_row_without_gradient_and_a_channel_without_activation_survive() -> None:
    group, weight = GROUPS[0], normal(20, 12)
    given = statistics(group)
    assert given.weight_gradient is not None and given.moments is not None
    given.weight_gradient.rows[3] = 0.0
    given.moments.absolute[3] = 0.0
    for whitening in (FisherRowsWhitening(ridge=1e-6), DiagonalWhitening(alpha=0.5, size="mean", epsilon=1e-6)):
        factors = truncate(decompose(group, weight, whitening.metric(given)), group.full_rank)
        torch.testing.assert_close(factors.basis @ factors.coefficients[0], weight, rtol=1e-6, atol=1e-6)


def test_no_gradient_at_all_is_an_error() -> None:
    given = dataclasses.replace(
        statistics(GROUPS[0]), weight_gradient=WeightGradient(rows=torch.zeros(20).double(), sensitivity=1.0)
    )
    with pytest.raises(DecompositionError, match="zero on all calibration sequences"):
        FisherRowsWhitening(ridge=1e-6).metric(given)


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: g.name)
def test_one_block_is_whitening_by_the_gram(group: WeightGroup) -> None:
    one = BlockDiagonalWhitening(blocks=1, ridge=1e-6).metric(statistics(group))
    gram = GramWhitening(ridge=1e-6).metric(statistics(group))
    assert torch.equal(whitener_of(one), whitener_of(gram))
    assert torch.equal(torch.as_tensor(one.ridge), torch.as_tensor(gram.ridge))


@pytest.mark.parametrize(("blocks", "sizes"), [(2, [10, 10]), (3, [7, 7, 6]), (20, [1] * 20), (99, [1] * 20)])
def test_blocks_are_whitened_apart(blocks: int, sizes: list[int]) -> None:
    """Oracle: every block of channels has its own Gram and its own root."""
    x = inputs(GROUPS[0])
    found = whitener_of(BlockDiagonalWhitening(blocks=blocks, ridge=0.0).metric(statistics(GROUPS[0])))
    roots = [torch.linalg.cholesky(part.T @ part).T for part in x.split(sizes, dim=1)]
    torch.testing.assert_close(found, torch.block_diag(*roots), rtol=1e-9, atol=1e-9)


def test_on_uncorrelated_channels_blocks_change_nothing() -> None:
    given = dataclasses.replace(statistics(GROUPS[0]), gram=torch.diag(torch.linspace(1, 9, 20).double()))
    whole = whitener_of(GramWhitening(ridge=0.0).metric(given))
    for blocks in (2, 7, 20):
        torch.testing.assert_close(whitener_of(BlockDiagonalWhitening(blocks=blocks, ridge=0.0).metric(given)), whole)


@pytest.mark.parametrize(
    ("strategy", "settings", "message"),
    [
        (DiagonalWhitening, {"alpha": -0.5}, r"^alpha must be a finite number of at least 0, got -0\.5"),
        (DiagonalWhitening, {"alpha": float("nan")}, r"^alpha must be"),
        (DiagonalWhitening, {"size": "median"}, r"^size must be one of mean, max, got 'median'"),
        (DiagonalWhitening, {"epsilon": 0.0}, r"^epsilon must be a finite number of at least 1e-12, got 0\.0"),
        (FisherRowsWhitening, {"ridge": 0.0}, r"^ridge must be above 0"),
        (BlockDiagonalWhitening, {"blocks": 0}, r"^blocks must be a whole number of at least 1, got 0"),
        (BlockDiagonalWhitening, {"blocks": 2.5}, r"^blocks must be a whole number"),
        (BlockDiagonalWhitening, {"ridge": -1.0}, r"^ridge must be at least 0"),
        (TwoSidedWhitening, {"curvature": "kl"}, r"^curvature must be one of auto, label, .*, got 'kl'"),
        (TwoSidedWhitening, {"probes": 0}, r"^probes must be a whole number of at least 1, got 0"),
        (TwoSidedWhitening, {"probe_seed": -1}, r"^probe_seed|^seed"),
        (TwoSidedWhitening, {"probed": "logits"}, r"^probed must be one of hidden, embedding, got 'logits'"),
    ],
)
def test_settings_that_make_no_sense(strategy: type, settings: dict[str, Any], message: str) -> None:
    usual: dict[type, dict[str, Any]] = {
        DiagonalWhitening: {"alpha": 0.5, "size": "mean", "epsilon": 1e-6},
        FisherRowsWhitening: {"ridge": 1e-6},
        BlockDiagonalWhitening: {"blocks": 4, "ridge": 1e-6},
        TwoSidedWhitening: {"ridge": 1e-6, "damping": 1e-4, "temper": 1.0},
    }
    with pytest.raises(ConfigError, match=message):
        strategy(**{**usual[strategy], **settings})


def test_outputs_without_influence_cost_nothing() -> None:
    """What follows a matrix may be all zero: then its error is free, and that of its neighbours is not."""
    whitening, group = TwoSidedWhitening(ridge=1e-6, damping=1e-4, temper=0.5), GROUPS[1]
    given = statistics(group)
    grams = dict(given.output_grams or {})
    grams[0] = torch.zeros_like(grams[0])
    metric = whitening.metric(dataclasses.replace(given, output_grams=grams))
    weight = normal(group.d_in, group.columns)
    kept = truncate(decompose(group, weight, metric), 8)
    alone = WeightGroup("q", (1,), 20, 16)
    metric_alone = whitening.metric(dataclasses.replace(given, group=alone, output_grams={1: grams[1]}))
    expected = truncate(decompose(alone, weight[:, 16:], metric_alone), 8)
    torch.testing.assert_close(kept.basis @ kept.coefficients[1], expected.basis @ expected.coefficients[1])
    nothing = whitening.metric(dataclasses.replace(given, output_grams=dict.fromkeys(grams, grams[0])))
    lost = [decompose(group, weight, m).spectrum.energies.sum() for m in (nothing, metric)]
    assert lost[0] < 1e-9 * lost[1]


def test_output_gradients_that_are_no_numbers_are_named() -> None:
    given = statistics(GROUPS[0])
    broken = {layer: gram * float("inf") for layer, gram in (given.output_grams or {}).items()}
    with pytest.raises(DecompositionError, match=r"Gram of the output gradients holds NaN.*model\.dtype=float32"):
        TwoSidedWhitening(ridge=0.0, damping=0.0, temper=1.0).metric(dataclasses.replace(given, output_grams=broken))
