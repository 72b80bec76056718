"""What every local importance keeps: a Gram stays a Gram, off is off, same in same out, the formulas of the papers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bs_exp.errors import ConfigError
from bs_exp.importance.adaptive_channel import AdaptiveChannelImportance
from bs_exp.importance.channel import ChannelImportance
from bs_exp.importance.none import NoImportance
from bs_exp.importance.soft_channel import SoftChannelImportance
from bs_exp.importance.weighting import top_count
from bs_exp.protocols import Importance
from bs_exp.testing import ImportanceContract
from bs_exp.testing.importance import CHANNELS, gram_of, inputs, statistics
from bs_exp.whitening.gram import GramWhitening
from tests.support.options import strategies

FORMS = ("one_sided", "two_sided")
MEASURES = ("spectrum", "kurtosis", "sensitivity")

Make = Callable[..., Importance]


def channel(**settings: Any) -> ChannelImportance:
    return ChannelImportance(**{"p": 0.2, "a": None, "form": "one_sided", **settings})


def soft(**settings: Any) -> SoftChannelImportance:
    return SoftChannelImportance(**{"p": 0.2, "a": None, "temperature": 0.5, "form": "one_sided", **settings})


def adaptive(**settings: Any) -> AdaptiveChannelImportance:
    if "a" in settings:
        settings["a_max"] = settings.pop("a")
    return AdaptiveChannelImportance(
        **{"p": 0.2, "a_min": 1.0, "a_max": None, "by": "spectrum", "form": "one_sided", **settings}
    )


MAKERS: list[Make] = [channel, soft, *(lambda by=by, **settings: adaptive(by=by, **settings) for by in MEASURES)]
STRATEGIES: list[Importance] = [NoImportance(), *(make(form=form) for make in MAKERS for form in FORMS)]


def root(matrix: Tensor) -> Tensor:
    """Square root of a positive semi-definite matrix, by Denman and Beavers' iteration: no decomposition."""
    root, inverse = matrix, torch.eye(len(matrix)).double()
    for _ in range(60):
        root, inverse = (root + torch.linalg.inv(inverse)) / 2, (inverse + torch.linalg.inv(root)) / 2
    return root


def formula(gram: Tensor, weights: Tensor, form: str) -> Tensor:
    """The papers' expressions, as they are written."""
    d = torch.diag(weights)
    return d @ gram @ d if form == "two_sided" else root(gram @ d @ d @ gram)


def hard_weights(x: Tensor, count: int, factor: float) -> Tensor:
    """alpha_j = sqrt(x_j^T (X X^T) x_j), channel by channel."""
    alphas = [math.sqrt(float(x[:, j] @ (x @ x.T) @ x[:, j])) for j in range(x.shape[1])]
    chosen = sorted(range(len(alphas)), key=lambda j: -alphas[j])[:count]
    return torch.tensor([factor if j in chosen else 1.0 for j in range(len(alphas))]).double()


class TestImportances(ImportanceContract):
    @pytest.fixture(scope="class", params=STRATEGIES, ids=repr)
    @classmethod
    def importance(cls, request: pytest.FixtureRequest) -> Any:
        return request.param


def test_every_option_is_among_them() -> None:
    assert strategies("importance") == {type(strategy) for strategy in STRATEGIES}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("off", [{"a": 1.0}, {"p": 0.0}], ids=["a=1", "p=0"])
def test_off_changes_nothing(make: Make, form: str, off: dict[str, float]) -> None:
    given = statistics(inputs())
    assert torch.equal(gram_of(make(form=form, **off).reweight(given)), gram_of(given))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("form", FORMS)
def test_a_factor_close_to_one_changes_next_to_nothing(make: Make, form: str) -> None:
    """Unlike a = 1, this runs through all of the mathematics."""
    given = statistics(inputs())
    found = gram_of(make(form=form, a=1.0 + 1e-12).reweight(given))
    torch.testing.assert_close(found, gram_of(given), rtol=0.0, atol=1e-10 * float(gram_of(given).norm()))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("form", FORMS)
def test_scale_of_the_inputs_scales_the_result(make: Make, form: str) -> None:
    small, large = statistics(inputs()), statistics(10.0 * inputs())
    importance = make(form=form)
    torch.testing.assert_close(100.0 * gram_of(importance.reweight(small)), gram_of(importance.reweight(large)))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("form", FORMS)
def test_a_dead_channel_stays_dead(make: Make, form: str) -> None:
    x = inputs()
    x[:, 5] = 0.0
    found = gram_of(make(form=form).reweight(statistics(x)))
    assert bool(found.isfinite().all())
    assert float(found[5].norm()) <= 1e-9 * float(found.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("p", "count"), [(0.2, 4), (0.01, 1), (0.5, 12)])
@pytest.mark.parametrize("a", [1.5, 30.0])
def test_channel_is_the_formula(form: str, p: float, count: int, a: float) -> None:
    x = inputs()
    expected = formula(x.T @ x, hard_weights(x, count, a), form)
    found = gram_of(channel(p=p, a=a, form=form).reweight(statistics(x)))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9 * float(expected.norm()))


def test_the_one_sided_form_is_the_official_codes_scaling() -> None:
    """`torch.svd(G * weights)`, `U sqrt(S)`: with W stored as out x in, W U sqrt(S) is what is decomposed there."""
    x = inputs()
    u, s, _ = torch.linalg.svd(x.T @ x * hard_weights(x, 4, 30.0))
    scaling = u * s.sqrt()
    weight = torch.randn(CHANNELS, 16, generator=torch.Generator().manual_seed(1)).double()
    metric = GramWhitening(ridge=0.0).metric(channel().reweight(statistics(x)))
    assert metric.whitener is not None
    torch.testing.assert_close(
        torch.linalg.svdvals(metric.whitener @ weight), torch.linalg.svdvals(weight.T @ scaling), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("make", [channel, soft])
def test_on_uncorrelated_channels_the_forms_differ_by_a_square(make: Make) -> None:
    values = torch.linspace(1.0, 5.0, CHANNELS).double()
    given = dataclasses.replace(statistics(inputs()), gram=torch.diag(values))
    if make is channel:
        one, two = make(form="one_sided", a=9.0), make(form="two_sided", a=3.0)
        torch.testing.assert_close(gram_of(one.reweight(given)), gram_of(two.reweight(given)))
    one, two = make(form="one_sided", a=9.0), make(form="two_sided", a=9.0)
    weights = gram_of(one.reweight(given)).diagonal() / values
    torch.testing.assert_close(gram_of(two.reweight(given)).diagonal(), values * weights**2)


def test_default_factors_are_the_forms_own() -> None:
    assert channel().a == 30.0 and channel(form="two_sided").a == pytest.approx(30**0.5)
    assert repr(channel()) == repr(channel(a=30))  # the key of cached decompositions


@pytest.mark.parametrize(
    ("p", "channels", "count"),
    [(0.03, 4096, 122), (0.03, 11008, 330), (0.03, 32, 1), (0.29, 100, 29), (0.0, 100, 0), (0.999, 10, 9)],
)
def test_the_top_share_is_rounded_down_but_not_to_nothing(p: float, channels: int, count: int) -> None:
    assert top_count(p, channels) == count


@pytest.mark.parametrize("form", FORMS)
def test_a_cold_soft_choice_is_the_hard_one(form: str) -> None:
    given = statistics(inputs())
    cold, hard = soft(temperature=1e-6, form=form), channel(form=form)
    torch.testing.assert_close(gram_of(cold.reweight(given)), gram_of(hard.reweight(given)))


def test_a_hot_soft_choice_weighs_all_channels_alike() -> None:
    given = statistics(inputs())
    found = gram_of(soft(temperature=1e9, a=3.0, form="two_sided").reweight(given))
    torch.testing.assert_close(found, 4.0 * gram_of(given), rtol=1e-6, atol=1e-6)


def test_soft_weights_are_the_formula_and_follow_importance() -> None:
    given = statistics(inputs())
    norms = gram_of(given).norm(dim=0)
    found = gram_of(soft(a=7.0, temperature=0.3, p=0.25, form="two_sided").reweight(given))
    weights = (found.diagonal() / gram_of(given).diagonal()).sqrt()
    logs = sorted((math.log(float(n)) for n in norms), reverse=True)
    threshold = (logs[5] + logs[6]) / 2  # 6 of 24
    expected = [1 + 6 / (1 + math.exp((threshold - math.log(float(n))) / 0.3)) for n in norms]
    torch.testing.assert_close(weights, torch.tensor(expected).double())
    assert torch.equal(weights.argsort(), norms.argsort())


@pytest.mark.parametrize("by", MEASURES)
@pytest.mark.parametrize("sensitivity", [0.0, 0.3, 1.0, 1e6])
@pytest.mark.parametrize("seed", range(4))
def test_adaptive_factors_stay_in_their_bounds_and_are_the_hard_choice(by: str, sensitivity: float, seed: int) -> None:
    given = statistics(inputs(seed), sensitivity=sensitivity)
    importance = adaptive(by=by, a_min=2.0, a_max=9.0)
    factor = importance.factor(given)
    assert 2.0 <= factor <= 9.0
    hard = channel(a=factor)
    assert torch.equal(gram_of(importance.reweight(given)), gram_of(hard.reweight(given)))


def test_spectrum_places_the_factor_by_entropy() -> None:
    def factor(values: list[float]) -> float:
        given = dataclasses.replace(statistics(inputs()), gram=torch.diag(torch.tensor(values).double()))
        return adaptive(by="spectrum", a_min=1.0, a_max=11.0).factor(given)

    assert factor([2.0] * 8) == pytest.approx(1.0, abs=1e-12)
    assert factor([1.0] + [0.0] * 7) == pytest.approx(11.0)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert factor([3.0, 1.0, 0.0, 0.0]) == pytest.approx(1 + 10 * (1 - entropy / math.log(4)))


def test_kurtosis_places_the_factor_by_the_tails() -> None:
    def factor(x: Tensor) -> float:
        return adaptive(by="kurtosis", a_min=1.0, a_max=11.0).factor(statistics(x))

    spikes = torch.zeros(1000, 4, dtype=torch.float64)
    spikes[::50] = 5.0  # kurtosis of a variable that is 0 but for a share q: 1 / q
    assert factor(spikes) == pytest.approx(1 + 10 * (1 - 3 / 50))
    assert factor(torch.ones(10, 4).double()) == 1.0
    gaussian = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert factor(gaussian) == pytest.approx(1.0, abs=0.3)


def test_an_average_layer_gets_the_middle_by_sensitivity() -> None:
    importance = adaptive(by="sensitivity", a_min=1.0, a_max=11.0)
    factors = [importance.factor(statistics(inputs(), sensitivity=s)) for s in (0.0, 0.5, 1.0, 3.0)]
    assert factors == pytest.approx([1.0, 1 + 10 / 3, 6.0, 8.5])


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (channel, {"p": 1.0}, r"^p must be at least 0 and below 1, got 1\.0"),
        (channel, {"p": -0.1}, r"^p must be"),
        (channel, {"a": 0.5}, r"^a must be a finite number of at least 1, got 0\.5"),
        (channel, {"a": math.inf}, r"^a must be a finite number"),
        (channel, {"a": math.nan}, r"^a must be a finite number"),
        (channel, {"form": "both"}, r"^form must be one of one_sided, two_sided, got 'both'"),
        (soft, {"temperature": 0.0}, r"^temperature must be a finite number of at least 1e-06, got 0\.0"),
        (soft, {"form": "none"}, r"^form must be one of"),
        (adaptive, {"a_min": 0.0}, r"^a_min must be a finite number of at least 1"),
        (adaptive, {"a_min": 31.0}, r"^a_min must be at most a_max, which is 30\.0, got 31\.0"),
        (adaptive, {"by": "mood"}, r"^by must be one of spectrum, kurtosis, sensitivity, got 'mood'"),
    ],
)
def test_settings_that_make_no_sense(make: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**settings)
