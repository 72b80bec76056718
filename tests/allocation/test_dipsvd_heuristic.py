"""DipSVD's two heuristics: the paper's formula, and what the official code does, by its own published numbers."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from bs_exp.allocation.dipsvd_heuristic import DipSvdHeuristic, code_shares
from bs_exp.errors import ConfigError
from bs_exp.rank_budget import spread
from bs_exp.types import LayerProfile
from tests.support.spectra import group, problem

# Vicuna-7B at 0.8, as printed in the official repository's notebook: inverted sensitivities, standardised negated
# effective ranks, and the ratios that come out with beta 0.25 and a spread of 0.2.
INVERSE_SENSITIVITY = """
2.98626845 3.76158279 11.25125558 15.3711208 13.05224219 18.78403581 15.40485544 19.76836687 6.01237409 6.15983875
7.1414301 8.2134103 9.54391004 9.92966623 9.71290982 9.89007972 6.063272 6.65403064 6.25942767 8.12329021 9.16280051
9.63697703 9.98259894 11.25522557 9.54700348 11.19413733 9.7344741 9.66874849 9.08034357 8.9294884 5.00476643 5.62293987
"""
FLATNESS = """
0.349912 3.181203 2.344080 1.720236 1.256352 0.952428 0.755144 0.595184 0.440556 0.280596 0.173956 0.099308 0.008665
-0.071315 -0.167291 -0.273931 -0.348579 -0.428559 -0.497875 -0.545863 -0.583187 -0.636507 -0.657835 -0.679163 -0.705823
-0.737815 -0.775139 -0.807131 -0.855119 -0.892443 -1.089727 -1.404315
"""
PUBLISHED = """
0.63938527 0.90251887 0.98 0.98 0.97351883 0.98 0.93972514 0.94518536 0.82393058 0.81342671 0.81679368 0.82073373
0.82264698 0.81710651 0.80560391 0.79528151 0.75863352 0.75671812 0.74666024 0.7552444 0.75683023 0.75289938 0.75187626
0.75431328 0.74419777 0.74657084 0.73643693 0.73216192 0.72387758 0.71857963 0.67763589 0.63150524
"""


def numbers(text: str) -> Tensor:
    return torch.tensor([float(word) for word in text.split()], dtype=torch.float64)


def heuristic(**dials: object) -> DipSvdHeuristic:
    settings: dict[str, object] = {
        "sign": "paper", "beta": 0.25, "effective_rank": "singular_values", "threshold": 0.95, "spread": 0.2,
        "min_ratio": None, "max_ratio": None,
    }  # fmt: skip
    return DipSvdHeuristic(**(settings | dials))  # type: ignore[arg-type]


def profile(sensitivity: list[float], values: Mapping[int, list[float]]) -> LayerProfile:
    return LayerProfile(
        sensitivity=torch.tensor(sensitivity, dtype=torch.float64),
        output_singular_values={layer: torch.tensor(v, dtype=torch.float64) for layer, v in values.items()},
    )


def test_code_gives_the_published_ratios() -> None:
    # Shares of a quarter sum to 1 already, and deviations are standardised: doing it again changes nothing.
    shares = code_shares(1.0 / numbers(INVERSE_SENSITIVITY), -numbers(FLATNESS), beta=0.25, spread=0.2, ratio=0.8)
    ones = torch.ones_like(shares)
    fitted = spread(shares, ones, 0.3 * ones, 0.98 * ones, 0.8 * 32)
    torch.testing.assert_close(fitted, numbers(PUBLISHED), rtol=0.0, atol=2e-4)


@pytest.mark.parametrize(("measure", "ranks"), [("singular_values", [3, 1, 2, 4]), ("energy", [2, 1, 2, 4])])
def test_paper_formula(measure: str, ranks: list[int]) -> None:
    """By hand: R from cumulated shares, Q = S^beta R^(1-beta), mean over blocks 0.6."""
    seen = profile(
        [1.0, 4.0, 2.0, 0.5],
        {0: [5, 3, 2, 0], 1: [97, 1, 1, 1], 2: [6, 6, 0, 0], 3: [1, 1, 1, 1]},
    )
    strategy = heuristic(beta=0.5, effective_rank=measure, threshold=0.85)
    quality = [s**0.5 * r**0.5 for s, r in zip([1.0, 4.0, 2.0, 0.5], ranks, strict=True)]
    expected = [0.6 * 4 * q / sum(quality) for q in quality]
    assert [strategy.rank_of(v) for v in (seen.output_singular_values or {}).values()] == ranks
    assert strategy.shares(seen, [0, 1, 2, 3], 0.6).tolist() == pytest.approx(expected)


def test_blocks_keep_what_their_quality_says_and_groups_the_mean() -> None:
    members = [group("q", 0, 1), group("q", 2), *(group("o", layer) for layer in range(3))]
    seen = profile([1.0, 2.0, 3.0], {layer: [1.0] * 8 for layer in range(3)})
    plan = heuristic(beta=1.0).allocate(problem(dict.fromkeys(members, 1.0), 0.3, seen))
    # 9600 parameters, 2880 kept in shares 1 : 2 : 3 by block, q[0,1] at 1.5: c (3200*1.5 + 1600*(3+1+2+3)) = 2880
    shares = [p.parameters / p.group.parameters for p in plan.groups]
    component = [(40 + p.group.columns) / p.group.parameters for p in plan.groups]
    expected = [0.15 * weight for weight in (1.5, 3.0, 1.0, 2.0, 3.0)]
    for share, meant, size in zip(shares, expected, component, strict=True):
        assert abs(share - meant) < size


def test_paper_and_code_have_opposite_orders() -> None:
    seen = profile([1.0, 2.0, 4.0, 3.0], {layer: [1.0] * (2 + layer) + [0.0] * (6 - layer) for layer in range(4)})
    paper, code = (heuristic(sign=sign, beta=0.0).shares(seen, [0, 1, 2, 3], 0.6) for sign in ("paper", "code"))
    assert paper.argsort().tolist() == [0, 1, 2, 3]
    assert code.argsort().tolist() == [3, 2, 1, 0]
    assert (float(code.min()), float(code.max())) == pytest.approx((0.4, 0.8))


@pytest.mark.parametrize("sign", ["paper", "code"])
def test_blocks_that_are_alike_keep_the_same(sign: str) -> None:
    seen = profile([2.0] * 4, {layer: [3.0, 2.0, 1.0] for layer in range(4)})
    assert heuristic(sign=sign).shares(seen, [0, 1, 2, 3], 0.7).tolist() == pytest.approx([0.7] * 4)


def test_bounds() -> None:
    members = [group("q", layer) for layer in range(4)]
    seen = profile([1.0, 1.0, 1.0, 100.0], {layer: [1.0] * 8 for layer in range(4)})
    plan = heuristic(beta=1.0, min_ratio=0.4, max_ratio=0.8).allocate(problem(dict.fromkeys(members, 1.0), 0.5, seen))
    assert [p.rank for p in plan.groups] == [8, 8, 8, 16]


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"sign": "both"}, "sign must be one of paper, code, got 'both'"),
        ({"effective_rank": "entropy"}, "effective_rank must be one of singular_values, energy"),
        ({"beta": 1.5}, r"beta must be between 0 .* got 1\.5"),
        ({"threshold": 0.0}, "threshold must be above 0"),
        ({"spread": -0.1}, "spread must be between 0"),
        ({"min_ratio": 0.9, "max_ratio": 0.8}, r"min_ratio < max_ratio <= 1, got 0\.9 and 0\.8"),
    ],
)
def test_settings_out_of_range(dials: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        heuristic(**dials)


def test_the_code_cannot_invert_nothing() -> None:
    seen = profile([1.0, 0.0], {0: [1.0, 1.0], 1: [1.0, 0.0]})
    with pytest.raises(ConfigError, match=r"layer 1 is 0\. Use allocation\.sign=paper"):
        heuristic(sign="code").shares(seen, [0, 1], 0.6)
