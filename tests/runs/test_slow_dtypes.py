"""A dtype that the CPU cannot multiply in is told, with what is faster."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bs_exp.models.offload import computes, place
from bs_exp.models.tiny import tiny_random
from bs_exp.runs.experiment import _slow

CPU = torch.device("cpu")


def test_the_way_out_depends_on_where_the_weights_are() -> None:
    dense = tiny_random()
    dense = replace(dense, module=dense.module.bfloat16())
    assert "no instructions for bfloat16" in _slow(dense) and "model.dtype=float32 is faster" in _slow(dense)
    place(dense.module, dense.architecture.blocks, CPU)
    assert "blocks compute in float32" in _slow(dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_32_and_64_bits_are_always_there(dtype: torch.dtype) -> None:
    assert computes(dtype, CPU)
    assert computes(torch.bfloat16, torch.device("cuda"))
