"""A server's layer of factorised matrices computes what the saved model's layers do, also in several processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from bs_exp.models.modeling_basis_sharing import (
    CorrectedLinear,
    FactorisedLinear,
    PivotedInputLinear,
    PivotedLinear,
    empty_layers,
    pack_bits,
)
from bs_exp.serving.factors import FactorisedLayer, SharedBases, factorised_layer
from bs_exp.serving.parts import StoredGroup, parts_of, share

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
D_IN, RANK = 16, 5
WIDTHS = {"q_proj": 16, "k_proj": 4, "v_proj": 4, "o_proj": 12}  # of the outputs
HEAD = 2


class Plain:
    """The method of a server that packs nothing."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        assert layer.weight.numel()

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.weight, bias)


def _saved(layout: str, members: Sequence[str], correction: int = 0) -> tuple[StoredGroup, dict[str, nn.Module]]:
    """A group with random factors, and its layers as Transformers builds them."""
    dense = [nn.Linear(D_IN, WIDTHS[name.rpartition(".")[2]], bias=False) for name in members]
    rank = min(RANK, *(layer.out_features for layer in dense))
    layers = empty_layers(layout, dense, members, rank)
    for layer in layers:
        for factor in (layer.basis, layer.weight):
            nn.init.normal_(factor)
        if isinstance(layer, PivotedLinear):
            features = layer.in_features if isinstance(layer, PivotedInputLinear) else layer.out_features
            random = torch.Generator().manual_seed(features)
            bits = torch.zeros(features, dtype=torch.bool)
            bits[torch.randperm(features, generator=random)[:rank]] = True
            layer.pivots = pack_bits(bits)
            for name, size in (("own_features", rank), ("other_features", features - rank)):
                layer.register_buffer(name, torch.empty(size, dtype=torch.int64), persistent=False)
            layer.refresh()
    saved: dict[str, nn.Module] = dict(zip(members, layers, strict=True))
    if correction:
        saved = {name: _corrected(layer, correction) for name, layer in zip(members, layers, strict=True)}
    return StoredGroup(tuple(members), rank, correction, type(layers[0]), None), saved


def _corrected(layer: FactorisedLinear, rank: int) -> CorrectedLinear:
    down, up = torch.randn(rank, layer.in_features), torch.randn(layer.out_features, rank)
    return CorrectedLinear(layer, nn.Parameter(down), nn.Parameter(up))


def _served(
    name: str, groups: Sequence[StoredGroup], saved: Mapping[str, nn.Module], bases: SharedBases, rank: int, size: int
) -> FactorisedLayer:
    """A layer of the server, in one of several processes, empty."""
    row = name.endswith("o_proj")
    names = [name.rpartition(".")[2]] if row else FUSED["qkv_proj"]
    full = [WIDTHS[part] for part in names]
    held = full if row else [max(HEAD, width // size) for width in full]
    parts = parts_of(name, len(full), groups, FUSED)
    assert parts is not None
    d_in_held = D_IN // size if row else D_IN
    shares = [share(p, full=full, held=held, d_in=D_IN, d_in_held=d_in_held, rank=rank, size=size) for p in parts]
    return factorised_layer(parts, shares, bases, FUSED, torch.float32, Plain())


def _fill(layers: Mapping[str, FactorisedLayer], saved: Mapping[str, nn.Module], owners: set[str]) -> None:
    """Loads what a checkpoint holds, in which a basis stands once: with its owner."""
    for layer in layers.values():
        for i, part in enumerate(layer.parts):
            for key, tensor in saved[part.part.name].state_dict().items():
                if key.rpartition(".")[2] != "basis" or part.part.name in owners:
                    layer.load(i, key, tensor.clone())
    for layer in layers.values():
        layer.finish()


def _model(layout: str, correction: int) -> tuple[list[StoredGroup], dict[str, nn.Module]]:
    """Two blocks: q and k share bases over both, v is single in one and dense in the other, o shares."""
    groups, saved = [], {}
    for members in (["0.q_proj", "1.q_proj"], ["0.k_proj", "1.k_proj"], ["0.v_proj"], ["0.o_proj", "1.o_proj"]):
        group, layers = _saved(layout, members, correction)
        groups.append(group)
        saved.update(layers)
    saved["1.v_proj"] = nn.Linear(D_IN, WIDTHS["v_proj"], bias=False)
    return groups, saved


@torch.no_grad()
@pytest.mark.parametrize("correction", [0, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("layout", ["plain", "pivoted"])
def test_all_processes_together_compute_what_the_saved_layers_do(layout: str, size: int, correction: int) -> None:
    torch.manual_seed(0)
    groups, saved = _model(layout, correction)
    owners = {group.members[0] for group in groups}
    x = torch.randn(3, D_IN)
    sums = {f"{block}.o_proj": torch.zeros(3, WIDTHS["o_proj"]) for block in (0, 1)}
    for rank in range(size):
        bases = SharedBases(torch.float32, Plain())
        names = [f"{block}.{last}" for block in (0, 1) for last in ("qkv_proj", "o_proj")]
        layers = {name: _served(name, groups, saved, bases, rank, size) for name in names}
        _fill(layers, saved, owners)
        for block in (0, 1):
            q, k, v = (saved[f"{block}.{name}_proj"](x) for name in "qkv")
            kv = slice(rank * 2 // size * HEAD, None)
            wanted = torch.cat(
                [
                    q[:, rank * 16 // size : (rank + 1) * 16 // size],
                    k[:, kv][:, : max(HEAD, 4 // size)],
                    v[:, kv][:, : max(HEAD, 4 // size)],
                ],
                dim=-1,
            )
            torch.testing.assert_close(layers[f"{block}.qkv_proj"](x, None), wanted, rtol=1e-4, atol=1e-4)
            part = x[:, rank * D_IN // size : (rank + 1) * D_IN // size]
            sums[f"{block}.o_proj"] += layers[f"{block}.o_proj"](part, None)
    for name, total in sums.items():
        torch.testing.assert_close(total, saved[name](x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["plain", "pivoted"])
def test_peers_hold_the_same_parameter(layout: str) -> None:
    groups, saved = _model(layout, 0)
    bases = SharedBases(torch.float32, Plain())
    names = [f"{block}.{last}" for block in (0, 1) for last in ("qkv_proj", "o_proj")]
    layers = {name: _served(name, groups, saved, bases, 0, 1) for name in names}
    assert layers["0.o_proj"].bases[0].map.weight is layers["1.o_proj"].bases[0].map.weight
    shared = 1 if layout == "plain" else 2  # pivots among the inputs cannot be stacked
    assert [layer.bases[0] for layer in layers.values()][::2] == [layers["0.qkv_proj"].bases[0]] * 2
    assert len(layers["0.qkv_proj"].bases) == shared + 1 and len(layers["1.qkv_proj"].bases) == shared
    served = sum(p.numel() for p in nn.ModuleDict({n.replace(".", "_"): m for n, m in layers.items()}).parameters())
    assert served == sum(
        p.numel() for p in nn.ModuleDict({n.replace(".", "_"): m for n, m in saved.items()}).parameters()
    )


def test_a_bias_is_added_once() -> None:
    groups, saved = _model("pivoted", 0)
    layers = {"0.qkv_proj": _served("0.qkv_proj", groups, saved, SharedBases(torch.float32, Plain()), 0, 1)}
    _fill(layers, saved, {"0.q_proj", "0.k_proj", "0.v_proj"})
    x, bias = torch.randn(3, D_IN), torch.randn(24)
    torch.testing.assert_close(layers["0.qkv_proj"](x, bias), layers["0.qkv_proj"](x, None) + bias)


def _one(layout: str = "pivoted") -> tuple[FactorisedLayer, dict[str, nn.Module]]:
    group, saved = _saved(layout, ["0.o_proj"])
    return _served("0.o_proj", [group], saved, SharedBases(torch.float32, Plain()), 0, 1), saved


def test_a_checkpoint_without_a_tensor_is_refused() -> None:
    layer, saved = _one()
    state = saved["0.o_proj"].state_dict()
    for name in ("basis", "weight", "pivots"):
        with pytest.raises(ValueError, match=r"0\.o_proj"):
            layer.finish()
        layer.load(0, name, state[name])
    layer.finish()


def test_a_tensor_of_another_shape_or_name_is_refused() -> None:
    layer, _ = _one()
    for name in ("basis", "weight"):
        with pytest.raises(ValueError, match=r"0\.o_proj.* has the shape \[3, 7\].* do not belong together"):
            layer.load(0, name, torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"0\.o_proj\.down, of which config\.json says nothing"):
        layer.load(0, "down", torch.zeros(3, 7))


def test_damaged_pivots_are_refused() -> None:
    layer, saved = _one()
    state = saved["0.o_proj"].state_dict()
    layer.load(0, "basis", state["basis"])
    layer.load(0, "weight", state["weight"])
    layer.load(0, "pivots", torch.zeros_like(state["pivots"]))
    with pytest.raises(ValueError, match=r"0\.o_proj .* and 0 bits"):
        layer.finish()


def test_peers_with_other_pivots_are_refused() -> None:
    group, saved = _saved("pivoted", ["0.o_proj", "1.o_proj"])
    saved["1.o_proj"].pivots = saved["1.o_proj"].pivots.flip(0)
    bases = SharedBases(torch.float32, Plain())
    layers = {name: _served(name, [group], saved, bases, 0, 1) for name in saved}
    with pytest.raises(ValueError, match="their pivots differ"):
        _fill(layers, saved, {"0.o_proj"})


def test_a_loader_that_transposes_weights_is_understood() -> None:
    """vLLM's GPT-2 transposes every `weight`, since Conv1D stores `[in, out]`; factors are `[out, in]` there, too."""
    layer, saved = _one("plain")
    state = saved["0.o_proj"].state_dict()
    layer.load(0, "basis", state["basis"])
    layer.load(0, "weight", state["weight"].t())
    layer.finish()
    x = torch.randn(3, D_IN)
    torch.testing.assert_close(layer(x, None), saved["0.o_proj"](x))
