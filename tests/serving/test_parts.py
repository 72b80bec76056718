"""Which stored matrices make up a server's layer, and what of them a process of several holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bs_exp.models.modeling_basis_sharing import FORMAT_VERSION, PivotedInputLinear, PivotedOutputLinear, SharedLinear
from bs_exp.serving.parts import StoredGroup, check_stages, held_features, parts_of, read_groups, renamed, share, stacks

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def _group(*members: str, kind: Any = SharedLinear) -> StoredGroup:
    return StoredGroup(members, rank=4, correction=0, kind=kind, checksum=None)


def _config(**changes: Any) -> dict[str, Any]:
    groups = [{"members": ["a.q_proj", "b.q_proj"], "rank": 4}, {"members": ["a.k_proj"], "rank": 3, "correction": 2}]
    return {
        "quant_method": "basis_sharing",
        "format_version": FORMAT_VERSION,
        "layout": "pivoted",
        "groups": groups,
        **changes,
    }


def test_groups_come_with_the_kind_of_their_layers() -> None:
    shared, single = read_groups(_config())
    assert (shared.members, shared.rank, shared.kind) == (("a.q_proj", "b.q_proj"), 4, PivotedInputLinear)
    assert (single.correction, single.kind) == (2, PivotedOutputLinear)
    assert {group.kind for group in read_groups(_config(layout="plain"))} == {SharedLinear}


def test_another_format_version_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=rf"format version 99 .* serves version {FORMAT_VERSION}.*trust_remote_code"):
        read_groups(_config(format_version=99))
    with pytest.raises(ValueError, match="format version None"):
        read_groups({key: value for key, value in _config().items() if key != "format_version"})


def test_matrices_cut_into_blocks_are_refused() -> None:
    split = {"module": "a.v_proj", "axis": "out", "sizes": [2, 2]}
    with pytest.raises(ValueError, match=r"a\.v_proj.*to_dense"):
        read_groups(_config(splits=[split]))


def test_experts_one_by_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"experts of 2 modules one by one \(such as a\.experts\).*--to dense"):
        read_groups(_config(experts=["a.experts", "b.experts"]))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_matrices_in_few_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"precision=int{bits}.*bs-exp export FOLDER --to dense"):
        read_groups(_config(precision={"bits": bits, "group_size": None, "symmetric": True}))


def test_groups_get_the_names_of_the_server() -> None:
    (group,) = renamed([_group("a.q", "gone")], {"a.q": "language.a.q"}.get)
    assert group.members == ("language.a.q", "gone")


def test_parts_of_a_fused_layer() -> None:
    q, v = _group("0.attn.q_proj", "1.attn.q_proj"), _group("0.attn.v_proj")
    parts = parts_of("0.attn.qkv_proj", 3, [q, v], FUSED)
    assert parts is not None
    assert [(part.name, part.group, part.segments) for part in parts] == [
        ("0.attn.q_proj", q, (0,)),
        ("0.attn.k_proj", None, (1,)),
        ("0.attn.v_proj", v, (2,)),
    ]
    assert parts_of("2.attn.qkv_proj", 3, [q, v], FUSED) is None
    assert parts_of("0.attn.o_proj", 1, [q, v], FUSED) is None


def test_a_matrix_that_is_stored_fused_makes_all_outputs_of_its_layer() -> None:
    group = _group("0.attn.qkv_proj")
    (part,) = parts_of("0.attn.qkv_proj", 3, [group], FUSED) or ()
    assert (part.group, part.segments) == (group, (0, 1, 2))


def test_a_layer_with_other_outputs_than_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match="5 outputs in the server, but is stored as 3 matrices"):
        parts_of("0.attn.qkv_proj", 5, [_group("0.attn.q_proj")], FUSED)


def test_bases_of_the_same_layers_are_stacked() -> None:
    q, k = _group("0.q_proj", "1.q_proj"), _group("0.k_proj", "1.k_proj")
    v, single = _group("0.v_proj", "1.v_proj", "2.v_proj"), _group("0.v_proj")
    assert stacks([q, k, v], FUSED) == [(q, k), (v,)]
    assert stacks([q, k, single], FUSED) == [(q, k), (single,)]
    # q and k of one layer, on one basis: it is there once.
    both = _group("0.q_proj", "0.k_proj")
    assert stacks([both, both, single], FUSED) == [(both, single)]
    # Peers have to stack alike, or the basis would be there twice.
    assert stacks([q, k], FUSED)[0] == stacks([q, k, v], FUSED)[0]


def test_bases_with_pivots_among_their_inputs_stand_alone() -> None:
    q, k = (_group(f"0.{m}_proj", f"1.{m}_proj", kind=PivotedInputLinear) for m in "qk")
    assert stacks([q, k], FUSED) == [(q,), (k,)]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_column_parallel_layer_is_split_by_its_outputs(size: int) -> None:
    # 8 heads of 2, of which 2 for keys and values.
    full, held = [16, 4, 4], [16 // size, max(2, 4 // size), max(2, 4 // size)]
    q, k, v = parts_of("0.qkv_proj", 3, [_group("0.q_proj")], FUSED) or ()
    for rank in range(size):
        sizes = {"full": full, "held": held, "d_in": 6, "d_in_held": 6, "rank": rank, "size": size}
        of_q, of_k = share(q, **sizes), share(k, **sizes)
        assert of_q.outputs == (slice(rank * held[0], (rank + 1) * held[0]),)
        first = rank * 2 // size * 2 if size > 1 else 0
        assert of_k.outputs == share(v, **sizes).outputs == (slice(first, first + held[1]),)
        assert of_q.all_inputs and (of_q.d_in, of_q.d_out, of_k.d_out) == (6, 16, 4)


def test_a_fused_matrix_is_split_output_by_output() -> None:
    (part,) = parts_of("0.gate_up_proj", 2, [_group("0.gate_up_proj")], FUSED) or ()
    second = share(part, full=[8, 8], held=[4, 4], d_in=6, d_in_held=6, rank=1, size=2)
    assert second.outputs == (slice(4, 8), slice(12, 16))
    assert second.output_features.tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    assert second.of_outputs(torch.arange(16)).tolist() == second.output_features.tolist()


def test_a_row_parallel_layer_is_split_by_its_inputs() -> None:
    (part,) = parts_of("0.o_proj", 1, [_group("0.o_proj")], FUSED) or ()
    second = share(part, full=[6], held=[6], d_in=16, d_in_held=4, rank=2, size=4)
    assert (second.inputs, second.outputs, second.all_inputs) == (slice(8, 12), (slice(0, 6),), False)


def test_held_features_of_a_pivoted_side() -> None:
    is_pivot = torch.tensor([True, False, False, True, True, False])
    held = held_features(is_pivot, torch.tensor([2, 3, 4]))
    assert held.own.tolist() == [1, 2] and held.components.tolist() == [1, 2]
    assert held.others.tolist() == [0] and held.rows.tolist() == [1]


def test_a_group_that_spans_stages_of_a_pipeline_is_refused() -> None:
    pairs = [_group(f"model.layers.{i}.q_proj", f"model.layers.{i + 1}.q_proj") for i in (0, 2)]
    check_stages(pairs, [0, 2])
    check_stages(pairs, [0])
    with pytest.raises(ValueError, match=r"layers\.2.*stage 0.*layers\.3.*stage 1.*pipeline_parallel_size=1"):
        check_stages(pairs, [0, 3])
