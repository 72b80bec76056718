"""SVD-LLM v2: what is removed goes with 1 / log of the loss at the uniform rank."""

from __future__ import annotations

import math

import pytest

from bs_exp.allocation.svd_llm_v2 import SvdLlmV2
from bs_exp.errors import ConfigError
from tests.support.spectra import decaying, group, in_nats, problem


def test_removed_shares_follow_the_formula_within_a_type() -> None:
    sizes = [10.0, 100.0, 1000.0, 50.0]
    spectra = [decaying(group("q", layer, d_in=300, d_out=300), 0.5, size) for layer, size in enumerate(sizes)]
    spectra += [decaying(group("o", layer, d_in=300, d_out=300), 0.5, 1e6) for layer in range(2)]
    plan = SvdLlmV2().allocate(problem(spectra, 0.7))
    uniform = int(0.7 * 300 * 300 / 600)
    losses = [math.sqrt(sum(float(e) for e in s.energies[uniform:])) for s in spectra[:4]]
    weights = [1 / math.log(loss) for loss in losses]
    for planned, weight in zip(plan.groups, weights, strict=False):
        removed = 4 * 0.3 * weight / sum(weights)
        assert planned.parameters / planned.group.parameters == pytest.approx(1 - removed, abs=600 / 300**2)
    assert [p.rank for p in plan.groups[4:]] == [uniform, uniform]
    kept = [p.parameters for p in plan.groups[:4]]
    assert kept[2] > kept[1] > kept[3] > kept[0]  # the larger the loss, the more is kept


def test_a_logarithm_needs_losses_above_one() -> None:
    with pytest.raises(ConfigError, match=r"q\[0\] has 0\.\d+ \(output_norm\).*Use whitening=gram"):
        SvdLlmV2().allocate(problem([decaying(group("q", 0), 1.0, 0.01)], 0.5))
    with pytest.raises(ConfigError, match=r"q\[0\] has .* \(nats\)"):
        SvdLlmV2().allocate(problem([in_nats(group("q", 0), [9.0] * 40)], 0.5))
