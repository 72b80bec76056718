"""Grams and moments are what the formulas say, cost no logits, and leave no hooks."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from bs_exp.calibration.activations import GramSum
from bs_exp.calibration.statistics import Seen, Subject
from bs_exp.errors import CalibrationError
from bs_exp.models.architecture import module_of
from bs_exp.models.tiny import tiny_random
from bs_exp.types import CalibrationData, LoadedModel, Statistic, TokenWindows, WeightMatrix
from tests.support.gathered import gathered, grams_of


def windows(count: int = 5, length: int = 16, seed: int = 0) -> TokenWindows:
    generator = torch.Generator().manual_seed(seed)
    return TokenWindows(ids=torch.randint(0, 256, (count, length), generator=generator), provenance={})


def hooks(model: LoadedModel) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.module.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "phi3"])
def test_every_matrix_has_the_gram_of_its_own_input(family: str) -> None:
    """Oracle: every module's input, kept, stacked, and multiplied in fp64; all in one batch, logits included."""
    model, data = tiny_random(family), windows()
    seen: dict[str, Tensor] = {}
    handles = [
        module_of(model.module, m).register_forward_pre_hook(
            lambda module, arguments, name=m.module: seen.__setitem__(name, arguments[0].detach().clone())
        )
        for m in model.architecture.matrices
    ]
    with torch.no_grad():
        model.module(data.ids)
    for handle in handles:
        handle.remove()
    grams = grams_of(model, CalibrationData(data, 2))
    for matrix in model.architecture.matrices:
        inputs = seen[matrix.module].reshape(-1, matrix.d_in).double()
        gram = grams[matrix.input_site]
        assert gram.dtype == torch.float64
        torch.testing.assert_close(gram, inputs.T @ inputs, rtol=1e-5, atol=1e-5)
    assert hooks(model) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_moments_are_those_of_all_inputs_and_come_with_the_grams(family: str) -> None:
    """Oracle: the inputs of every module, kept, in one batch."""
    model, data = tiny_random(family), windows()
    seen: dict[str, Tensor] = {}
    handles = [
        module_of(model.module, m).register_forward_pre_hook(
            lambda module, arguments, name=m.module: seen.__setitem__(name, arguments[0].detach().clone())
        )
        for m in model.architecture.matrices
    ]
    with torch.no_grad():
        model.module(data.ids)
    for handle in handles:
        handle.remove()
    found = gathered(model, CalibrationData(data, 2), Statistic.GRAM, Statistic.INPUT_MOMENTS)
    grams = grams_of(model, CalibrationData(data, 2))
    for matrix in model.architecture.matrices:
        inputs = seen[matrix.module].reshape(-1, matrix.d_in).double()
        moments = found[Statistic.INPUT_MOMENTS][matrix.input_site]
        for name, expected in (
            ("absolute", inputs.abs().mean(0)),
            ("peak", inputs.abs().amax(0)),
            ("fourth", inputs.pow(4).mean(0)),
        ):
            torch.testing.assert_close(moments[name], expected, rtol=1e-5, atol=1e-8)
        assert torch.equal(found[Statistic.GRAM][matrix.input_site]["gram"], grams[matrix.input_site])


def test_one_gram_per_input_site() -> None:
    model = tiny_random("llama")
    grams = grams_of(model, CalibrationData(windows(), 5))
    assert len(grams) == 4 * model.architecture.num_layers < len(model.architecture.matrices)


def test_no_logits_are_computed() -> None:
    model = tiny_random("llama")

    def forbidden(module: nn.Module, arguments: object) -> None:
        raise AssertionError("the language-model head ran during calibration")

    head = model.module.get_output_embeddings()
    assert isinstance(head, nn.Module)
    with_handle = head.register_forward_pre_hook(forbidden)
    try:
        grams_of(model, CalibrationData(windows(), 5))
    finally:
        with_handle.remove()


def test_nan_activations_name_the_first_matrices_and_leave_no_hooks() -> None:
    model = tiny_random("llama")
    with torch.no_grad():
        module_of(model.module, model.architecture.by_position["o", 1]).weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.gate_proj.*NaN"):
        grams_of(model, CalibrationData(windows(), 2))
    assert hooks(model) == 0


def test_hooks_are_gone_after_a_failure() -> None:
    model = tiny_random("llama")
    with pytest.raises(IndexError):
        grams_of(model, CalibrationData(TokenWindows(ids=torch.full((1, 4), 10**6), provenance={}), 1))
    assert hooks(model) == 0


def test_matrices_of_one_site_must_read_the_same_input() -> None:
    model = tiny_random("llama")
    value = module_of(model.module, model.architecture.by_position["v", 0])
    handle = value.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 2,))
    try:
        with pytest.raises(CalibrationError, match=r"v_proj does not read the same input"):
            grams_of(model, CalibrationData(windows(), 2))
    finally:
        handle.remove()


def _gram(rows: Tensor) -> Tensor:
    channels = rows.shape[1]
    total = GramSum(Subject("site", 0, (WeightMatrix("q", 0, "site", "q", channels, channels),)), batches=1)
    total.add(Seen(rows))
    return total.tensors()["gram"]


@pytest.mark.parametrize(("tokens", "channels"), [(1, 1), (1, 5), (7, 3), (300, 64)])
def test_the_gram_is_that_of_exact_arithmetic(tokens: int, channels: int) -> None:
    """Of inputs in fp32: within the bound of summing in any order (Higham, section 3.1)."""
    values = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(channels)
    values = values.clamp(-1e6, 1e6)
    rows = values.double()
    upper = _gram(values)
    exact = [[sum(Fraction(a) * Fraction(b) for a, b in zip(x, y, strict=True)) for y in rows.T.tolist()[:5]]
             for x in rows.T.tolist()[:5]]  # fmt: skip
    bound = (rows.abs().mT @ rows.abs()) * tokens * torch.finfo(torch.float64).eps
    for i, row in enumerate(exact):
        for j, value in enumerate(row):
            if i <= j:
                assert abs(Fraction(float(upper[i, j])) - value) <= Fraction(float(bound[i, j]))


def test_sums_of_grams_are_symmetric_and_read_any_strides() -> None:
    for gram in grams_of(tiny_random("llama"), CalibrationData(windows(), 2)).values():
        assert torch.equal(gram, gram.mT)
    values = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))
    whole = values.reshape(-1, 16)
    strided = torch.randn(16, 80, generator=torch.Generator().manual_seed(1)).mT
    for rows in (whole, strided, whole[::2]):
        exact = rows.double()
        assert torch.allclose(_gram(rows), exact.mT @ exact, rtol=1e-14, atol=1e-12)
