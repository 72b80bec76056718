"""Reduced-rank regression on tokens themselves, for what is computed from their second moments."""

from __future__ import annotations

import torch
from torch import Tensor


def reduced_rank(inputs: Tensor, wanted: Tensor, rank: int) -> Tensor:
    """Least `||inputs P - wanted||` of a rank: least squares, then the leading directions of what it gives."""
    whole = torch.linalg.lstsq(inputs, wanted, driver="gelsd").solution
    leading = torch.linalg.svd(inputs @ whole, full_matrices=False).Vh[:rank]
    return whole @ leading.mT @ leading
