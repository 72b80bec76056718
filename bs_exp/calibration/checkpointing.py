"""Backward passes through models whose activations do not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import takewhile

from torch import nn
from torch.utils.checkpoint import checkpoint

from bs_exp.types import Architecture, LoadedModel

# From so many parameters on: the activations of one window of 2048 tokens then take several GB, those of a batch tens.
LARGE = 1_000_000_000


def is_large(model: LoadedModel) -> bool:
    """Whether keeping all activations of a batch would take more memory than a third forward pass is worth."""
    return sum(parameter.numel() for parameter in model.module.parameters()) >= LARGE


@contextmanager
def recomputed_blocks(model: LoadedModel) -> Iterator[None]:
    """Blocks keep their inputs alone and are computed again in the backward pass: the same gradients, bit for bit.

    Hooks on modules inside see the first computation and the second; gradients reach the tensors of the first.
    """
    blocks = [model.module.get_submodule(path) for path in block_paths(model.architecture)]
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            _restore(block, forward)


def block_paths(architecture: Architecture) -> tuple[str, ...]:
    """The innermost module that holds all matrices of a layer, by layer."""
    paths: dict[int, list[str]] = {}
    for matrix in architecture.matrices:
        parts = matrix.module.split(".")
        known = paths.setdefault(matrix.layer, parts)
        paths[matrix.layer] = [
            a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(known, parts, strict=False))
        ]
    return tuple(".".join(parts) for _, parts in sorted(paths.items()))


def _restore(block: nn.Module, forward: object) -> None:
    if forward is None:
        del block.forward  # the class's own shows again
    else:
        block.__dict__["forward"] = forward
