from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from bs_exp.errors import DecompositionError, ModelError
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.architecture import weight_of
from bs_exp.models.modeling_basis_sharing import SharedLinear
from bs_exp.models.surgery import exchange_factors, is_factorised, replace_matrices, to_dense, twin
from bs_exp.models.tiny import FAMILIES, TinyRandom
from bs_exp.protocols import Layout
from bs_exp.testing.models import LAYOUTS, same, values
from bs_exp.types import LoadedModel, SharedFactors
from tests.support.factorised import compressed_twin, logits_of, random_factors

Dense = Callable[[str], LoadedModel]
PLAIN = PlainLayout()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_a_dense_model_with_the_same_products(dense: Dense, family: str) -> None:
    loaded = dense(family)
    expected = copy.deepcopy(loaded.module)
    for shared in random_factors(loaded.architecture):
        for layer, coefficients in shared.coefficients.items():
            weight = weight_of(expected, loaded.architecture.by_position[shared.group.matrix, layer])
            weight.detach().copy_(shared.basis @ coefficients)
    compressed = compressed_twin(loaded)
    assert not torch.allclose(logits_of(compressed), logits_of(loaded.module), atol=0.1)
    torch.testing.assert_close(logits_of(compressed), logits_of(expected), rtol=0, atol=5e-5)
    torch.testing.assert_close(logits_of(to_dense(compressed)), logits_of(expected), rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_basis_is_one_parameter_and_everything_else_is_that_of_the_dense_model(dense: Dense, family: str) -> None:
    loaded = dense(family)
    compressed = compressed_twin(loaded)
    replaced = {matrix.module for matrix in loaded.architecture.matrices}
    groups = [shared.group for shared in random_factors(loaded.architecture)]
    for group in groups:
        members = [loaded.architecture.by_position[group.matrix, layer].module for layer in group.layers]
        layers = [compressed.get_submodule(name) for name in members]
        assert all(isinstance(layer, SharedLinear) and layer.basis is layers[0].basis for layer in layers)
        assert [layer.bias for layer in layers] == [loaded.module.get_submodule(name).bias for name in members]

    dense_tensors = dict(loaded.module.named_parameters()) | dict(loaded.module.named_buffers())
    for name, tensor in [*compressed.named_parameters(), *compressed.named_buffers()]:
        if name.rpartition(".")[0] not in replaced or name.endswith(".bias"):
            assert tensor is dense_tensors[name], name

    kept = sum(p.numel() for p in loaded.module.parameters()) - loaded.architecture.parameters
    ranks = {2: 4, 1: 3}
    factors = sum(ranks[group.size] * (group.d_in + group.columns) for group in groups)
    assert sum(p.numel() for p in compressed.parameters()) == kept + factors


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_original_is_bitwise_unchanged(family: str) -> None:
    loaded = TinyRandom(family=family).load()
    weights = {name: tensor.clone() for name, tensor in loaded.module.state_dict().items()}
    modules = {name: id(module) for name, module in loaded.module.named_modules()}
    config, logits = loaded.module.config.to_dict(), logits_of(loaded.module)
    compressed = compressed_twin(loaded)
    to_dense(compressed)
    assert {name: id(module) for name, module in loaded.module.named_modules()} == modules
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.module.state_dict().items())
    assert loaded.module.config.to_dict() == config
    assert torch.equal(logits_of(loaded.module), logits)
    assert is_factorised(compressed)
    assert not is_factorised(loaded.module)


def test_to_dense_leaves_the_compressed_model_and_shares_the_rest(dense: Dense) -> None:
    compressed = compressed_twin(dense("gpt2"))
    logits = logits_of(compressed)
    restored = to_dense(compressed)
    assert torch.equal(logits_of(compressed), logits)
    assert is_factorised(compressed)
    assert not is_factorised(restored)
    assert not any(isinstance(module, SharedLinear) for module in restored.modules())
    assert [type(m) for m in restored.modules()] == [type(m) for m in dense("gpt2").module.modules()]
    assert restored.transformer.wte.weight is compressed.transformer.wte.weight
    assert not hasattr(restored.config, "quantization_config")
    assert restored._tied_weights_keys == dense("gpt2").module._tied_weights_keys
    assert restored.all_tied_weights_keys == dense("gpt2").module.all_tied_weights_keys


def test_a_copy_shares_its_own_basis(dense: Dense) -> None:
    compressed = compressed_twin(dense("llama"))
    copied = copy.deepcopy(compressed)
    first, second = (copied.model.layers[i].mlp.up_proj for i in (0, 1))
    assert first.basis is second.basis
    assert first.basis is not compressed.model.layers[0].mlp.up_proj.basis
    assert torch.equal(logits_of(copied), logits_of(compressed))


def test_dtype_of_the_model_is_kept() -> None:
    loaded = TinyRandom(family="llama", dtype="bfloat16").load()
    compressed = compressed_twin(loaded)
    assert {p.dtype for p in compressed.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in to_dense(compressed).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in twin(compressed).dequantize(dtype=torch.float32).parameters()} == {torch.float32}


def test_no_group_leaves_an_ordinary_model(dense: Dense) -> None:
    module = twin(dense("llama").module)
    replace_matrices(module, dense("llama").architecture, iter(()), PLAIN)
    assert not is_factorised(module)
    with pytest.raises(ModelError, match="nothing to make dense"):
        to_dense(module)


def test_factors_are_taken_one_group_at_a_time(dense: Dense) -> None:
    """With a 7B model in fp64, two groups at once would not fit."""
    previous: list[weakref.ref[torch.Tensor]] = []

    def watched() -> Iterator[SharedFactors]:
        source = random_factors(dense("llama").architecture)
        while True:
            assert all(reference() is None for reference in previous)
            shared = next(source, None)
            if shared is None:
                return
            # a copy, because the generator behind `source` still holds its own tensor
            shared = replace(shared, basis=shared.basis.clone())
            previous.append(weakref.ref(shared.basis))
            yield shared
            del shared

    replace_matrices(twin(dense("llama").module), dense("llama").architecture, watched(), PLAIN)
    assert len(previous) == 14


def test_values_beyond_half_precision_are_an_error() -> None:
    loaded = TinyRandom(family="llama", dtype="float16").load()
    shared = next(random_factors(loaded.architecture))
    large = replace(shared, coefficients={layer: 1e6 * c for layer, c in shared.coefficients.items()})
    with pytest.raises(DecompositionError, match=r"coefficients of layer 0 of group q\[0,1\].*float16.*bfloat16"):
        replace_matrices(twin(loaded.module), loaded.architecture, [large], PLAIN)
    broken = replace(shared, basis=shared.basis * float("nan"))
    with pytest.raises(DecompositionError, match=r"basis of group q\[0,1\]: NaN"):
        replace_matrices(twin(loaded.module), loaded.architecture, [broken], PLAIN)


def test_factors_that_do_not_fit_are_an_error(dense: Dense) -> None:
    loaded = dense("llama")
    shared = next(random_factors(loaded.architecture))
    with pytest.raises(DecompositionError, match=r"q\[0,1\] do not fit"):
        replace_matrices(twin(loaded.module), loaded.architecture, [replace(shared, basis=shared.basis[:-1])], PLAIN)
    with pytest.raises(DecompositionError, match=r"q\[0,1\] do not fit"):
        alone = replace(shared, coefficients={0: shared.coefficients[0]})
        replace_matrices(twin(loaded.module), loaded.architecture, [alone], PLAIN)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_exchanged_factors_are_those_of_the_group_and_of_no_other(layout: Layout) -> None:
    loaded = TinyRandom(family="llama").load()
    compressed, wanted = compressed_twin(loaded, layout), twin(loaded.module)
    first, *others = random_factors(loaded.architecture)
    other = replace(first, coefficients={layer: 2.0 * c.flip(0) for layer, c in first.coefficients.items()})
    exchange_factors(compressed, loaded.architecture, layout.arrange(other))
    replace_matrices(wanted, loaded.architecture, [other, *others], layout)
    assert same(values(compressed), values(wanted))
    members = [loaded.architecture.by_position["q", layer].module for layer in first.group.layers]
    bases = [compressed.get_submodule(name).basis for name in members]
    assert bases[0] is bases[1]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_factors_that_cannot_be_exchanged_leave_the_group_as_it_is(layout: Layout) -> None:
    loaded = TinyRandom(family="llama", dtype="float16").load()
    compressed = compressed_twin(loaded, layout)
    before = values(compressed)
    shared = next(random_factors(loaded.architecture))
    scales = {layer: 1e9 if layer == 1 else 2.0 for layer in shared.coefficients}
    large = replace(shared, coefficients={layer: scales[layer] * c for layer, c in shared.coefficients.items()})
    with pytest.raises(DecompositionError, match=r"coefficients of layer 1 of group q\[0,1\]"):
        exchange_factors(compressed, loaded.architecture, layout.arrange(large))
    less = replace(shared, basis=shared.basis[:, 1:], coefficients={i: c[1:] for i, c in shared.coefficients.items()})
    with pytest.raises(DecompositionError, match=r"have rank 3, those in the model 4"):
        exchange_factors(compressed, loaded.architecture, layout.arrange(less))
    assert same(values(compressed), before)
    with pytest.raises(ModelError, match=r"q_proj is a Linear, whose factors cannot be exchanged for those of q"):
        exchange_factors(twin(loaded.module), loaded.architecture, layout.arrange(shared))


def test_a_compressed_model_is_not_compressed_again(dense: Dense) -> None:
    compressed = compressed_twin(dense("llama"))
    with pytest.raises(ModelError, match="fresh twin"):
        replace_matrices(compressed, dense("llama").architecture, random_factors(dense("llama").architecture), PLAIN)


def test_weights_that_are_not_in_memory_are_an_error(dense: Dense) -> None:
    module = copy.deepcopy(dense("llama").module).to("meta")
    with pytest.raises(ModelError, match="not in memory"):
        replace_matrices(module, dense("llama").architecture, random_factors(dense("llama").architecture), PLAIN)


def test_gradients_of_all_members_reach_the_basis(dense: Dense) -> None:
    loaded = dense("llama")
    compressed = copy.deepcopy(compressed_twin(loaded))
    ids = torch.arange(12).view(1, 12)
    compressed(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in compressed.parameters())
    first, second = (compressed.model.layers[i].self_attn.v_proj for i in (0, 1))
    assert first.basis.grad is second.basis.grad
    before = logits_of(compressed)
    torch.optim.SGD(compressed.parameters(), lr=0.1).step()
    assert first.basis is second.basis
    assert not torch.equal(logits_of(compressed), before)


def test_compiles_to_one_graph(dense: Dense) -> None:
    compressed = compressed_twin(dense("llama"))
    compiled = torch.compile(compressed, backend="eager", fullgraph=True)
    assert torch.equal(logits_of(compiled), logits_of(compressed))


def test_layer_is_linear_on_any_leading_shape() -> None:
    layer = SharedLinear(
        nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(7, 2)), nn.Parameter(torch.randn(7)), is_conv1d=False
    )
    assert (layer.in_features, layer.out_features, layer.rank) == (5, 7, 2)
    assert "in_features=5, out_features=7, rank=2, bias=True" in repr(layer)
    x = torch.randn(2, 3, 5)
    expected = x @ layer.basis.T @ layer.weight.T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.to_dense()(x), expected)
