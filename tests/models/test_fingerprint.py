"""Fingerprints follow the content of a model, nothing else."""

from __future__ import annotations

import copy

import pytest
import torch

from bs_exp.errors import ModelError
from bs_exp.models import fingerprint as fingerprint_module
from bs_exp.models.fingerprint import fingerprint
from bs_exp.models.tiny import tiny_random


def test_one_bit_of_one_weight_changes_it() -> None:
    model = tiny_random().module
    before = fingerprint(model)
    weight = model.get_submodule("model.layers.2.mlp.down_proj").weight
    bits = weight.data.view(torch.int32)
    bits[5, 7] ^= 1
    assert fingerprint(model) != before
    bits[5, 7] ^= 1
    assert fingerprint(model) == before


def test_names_dtypes_and_configuration_count_but_not_where_a_model_lies() -> None:
    model = tiny_random().module
    before = fingerprint(model)
    model.config._name_or_path = "/elsewhere"
    model.config.transformers_version = "4.0"
    assert fingerprint(model) == before
    assert fingerprint(copy.deepcopy(model)) == before
    assert fingerprint(copy.deepcopy(model).double()) != before
    model.config.rms_norm_eps = 1e-3
    assert fingerprint(model) != before


def test_shape_counts_where_the_bytes_are_the_same() -> None:
    model = tiny_random().module
    before = fingerprint(model)
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    layer.weight = torch.nn.Parameter(layer.weight.detach().reshape(48, 32))
    assert fingerprint(model) != before


def test_chunks_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_random("gpt2").module
    before = fingerprint(model)
    monkeypatch.setattr(fingerprint_module, "_CHUNK", 37)
    assert fingerprint(model) == before


def test_memory_layout_and_gradients_do_not_count() -> None:
    model = tiny_random().module
    before = fingerprint(model)
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    layer.weight = torch.nn.Parameter(layer.weight.detach().T.contiguous().T, requires_grad=False)
    assert not layer.weight.is_contiguous()
    assert fingerprint(model) == before


def test_a_tied_weight_is_not_the_same_as_an_equal_one() -> None:
    model = tiny_random("gpt2").module
    before = fingerprint(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert fingerprint(model) != before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    model = tiny_random("opt").module
    with torch.no_grad():
        model.get_submodule("model.decoder.layers.1.fc1").weight[3, 4:6] = value
    with pytest.raises(ModelError, match=r"model\.decoder\.layers\.1\.fc1\.weight of shape \(48, 32\).* 2 values"):
        fingerprint(model)
