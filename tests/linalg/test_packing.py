"""Half of a symmetric matrix is all of it."""

from __future__ import annotations

import pytest
import torch

from bs_exp.linalg.packing import pack_symmetric, unpack_symmetric


@pytest.mark.parametrize("size", [1, 2, 7, 256, 300, 513])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_symmetric_matrix_comes_back(size: int, dtype: torch.dtype) -> None:
    rows = torch.randn(size + 3, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    gram = (rows.mT @ rows).to(dtype).double()
    gram = gram.triu() + gram.triu(1).mT
    packed = pack_symmetric(gram, dtype)
    assert packed.shape == (size * (size + 1) // 2,) and packed.dtype is dtype
    assert torch.equal(unpack_symmetric(packed), gram)
