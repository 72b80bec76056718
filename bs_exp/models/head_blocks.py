"""Attention matrices split by head: a twin of the model in which every block of heads is a matrix of its own."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace

from bs_exp.cache import content_key
from bs_exp.errors import ConfigError
from bs_exp.models.architecture import module_of
from bs_exp.models.modeling_basis_sharing import SplitLinear
from bs_exp.models.surgery import twin
from bs_exp.types import LoadedModel, WeightMatrix

# Matrix type -> side that is split. Every head of q, k and v reads all inputs; a head's part of o reads its own.
CUT_ALONG: Mapping[str, str] = {"q": "out", "k": "out", "v": "out", "o": "in"}
FUSED = ("qkv", "q_a", "q_b", "kv_a", "kv_b")
KV = "kv"
ALL = "all"


def cut_heads(dense: LoadedModel, types: Set[str], heads_per_block: int | str) -> LoadedModel:
    """A twin in which the matrices of these types are `SplitLinear`s, with views of the same weights as blocks.

    Block i of a type T has the matrix type `T.i`. A block holds `heads_per_block` query heads: a number, or `kv` for
    all that share a head of keys and values; `all` leaves the matrices whole and returns `dense` itself. Blocks of k
    and v hold the heads that a block of q reads, at least one. Raises ConfigError if the matrices cannot be split so.
    """
    if heads_per_block == ALL:
        return dense
    wanted = types & CUT_ALONG.keys()
    cut = {m.module: _sizes(dense, m, heads_per_block) for m in dense.architecture.matrices if m.matrix in wanted}
    cut = {name: sizes for name, sizes in cut.items() if len(sizes) > 1}
    module = twin(dense.module)
    matrices: list[WeightMatrix] = []
    for matrix in dense.architecture.matrices:
        if matrix.module not in cut:
            matrices.append(matrix)
            continue
        axis, sizes = CUT_ALONG[matrix.matrix], cut[matrix.module]
        module.set_submodule(matrix.module, SplitLinear.cutting(module_of(module, matrix), sizes, axis))
        matrices += [_block(matrix, i, size, axis) for i, size in enumerate(sizes)]
    fingerprint = content_key(model=dense.fingerprint, cut=cut)
    return replace(
        dense,
        module=module,
        architecture=replace(dense.architecture, matrices=tuple(matrices)),
        provenance={**dense.provenance, "fingerprint": fingerprint},
    )


def check_separate(dense: LoadedModel) -> None:
    """ConfigError unless queries, keys and values are matrices of their own."""
    types = dense.architecture.matrix_types
    if fused := [matrix for matrix in types if matrix in FUSED]:
        raise ConfigError(
            f"sharing=heads cannot cut {', '.join(fused)} of this {dense.architecture.family} model by head: queries, "
            "keys and values are not matrices of their own there. Use sharing=attention, or "
            "sharing.heads_per_block=all."
        )
    if absent := [matrix for matrix in ("q", "k", "v") if matrix not in types]:
        raise ConfigError(
            f"sharing=heads needs matrices of the types q, k and v; this {dense.architecture.family} model has no "
            f"{', '.join(absent)} (it has {', '.join(types)})."
        )


def _block(matrix: WeightMatrix, index: int, size: int, axis: str) -> WeightMatrix:
    shape = {"d_out": size} if axis == "out" else {"d_in": size, "site": f"{matrix.site}.{index}"}
    return replace(matrix, matrix=f"{matrix.matrix}.{index}", module=f"{matrix.module}.blocks.{index}", **shape)


def _sizes(dense: LoadedModel, matrix: WeightMatrix, heads_per_block: int | str) -> list[int]:
    """Sizes of the blocks of a matrix, in channels, along the side that is split; ConfigError if they do not fit."""
    heads = _query_heads(dense)
    positions = dense.architecture.by_position
    queries, keys = (positions[name, matrix.layer].d_out for name in ("q", "k"))
    width = queries // heads
    if width * heads != queries or keys % width or heads % (keys // width):
        raise ConfigError(
            f"sharing=heads: layer {matrix.layer} has queries of {queries} and keys of {keys} channels, which do not "
            f"fit {heads} heads (num_attention_heads). Use sharing.heads_per_block=all."
        )
    queries_per_key = heads * width // keys
    wanted = queries_per_key if heads_per_block == KV else int(heads_per_block)
    fitting = [
        n for n in range(1, heads + 1) if heads % n == 0 and (n % queries_per_key == 0 or queries_per_key % n == 0)
    ]
    if wanted not in fitting:
        raise ConfigError(
            f"sharing.heads_per_block must be {KV}, {ALL}, or one of {', '.join(map(str, fitting))} ({heads} query "
            f"heads, {queries_per_key} for each head of keys and values), got {heads_per_block}."
        )
    per_block = wanted if matrix.matrix in ("q", "o") else max(1, wanted // queries_per_key)
    total = matrix.d_in if CUT_ALONG[matrix.matrix] == "in" else matrix.d_out
    return [per_block * width] * (total // (per_block * width))


def _query_heads(dense: LoadedModel) -> int:
    heads = getattr(dense.module.config.get_text_config(), "num_attention_heads", None)
    if not isinstance(heads, int):
        raise ConfigError(
            f"sharing=heads: the configuration of this {dense.architecture.family} model does not say how many heads "
            "it has (num_attention_heads). Use sharing=attention."
        )
    return heads
