"""Factors without their redundancy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import scipy.linalg
import torch

from bs_exp.types import PivotedFactors, SharedFactors, WeightGroup


@dataclass(frozen=True, kw_only=True)
class PivotedLayout:
    """k columns of the product itself as the basis, and coefficients for the other N - k columns only.

    `B C = (B C_J)(C_J^-1 C)` for k independent columns J of C, and the block J of `C_J^-1 C` is the identity, which
    need not be stored: the same product with k^2 fewer parameters. One bit per column says whether it belongs to J;
    these bits are counted as parameters of 16 bits. Pivoting Factorization (2501.19090) for a single matrix.
    """

    name: ClassVar[str] = "pivoted"

    def parameters(self, group: WeightGroup, rank: int) -> int:
        return rank * (group.d_in + group.columns - rank) + group.size * -(-group.d_out // 16)

    def arrange(self, factors: SharedFactors) -> PivotedFactors:
        """Pivots by QR with column pivoting of the coefficients: what is stored stays small and well conditioned."""
        group, rank = factors.group, factors.rank
        coefficients = torch.cat([factors.coefficients[layer] for layer in group.layers], dim=1).double()
        triangle, order = scipy.linalg.qr(coefficients.cpu().numpy(), mode="r", pivoting=True)
        # In the order of the columns a bit per column is all that has to be kept of the choice.
        columns = torch.from_numpy(order[:rank].copy()).long().sort()
        others = scipy.linalg.solve_triangular(triangle[:, :rank], triangle[:, rank:])
        # C_J^-1 C for the columns that are not pivots; its rows follow the sorted pivots.
        stored = torch.zeros(rank, group.columns, dtype=torch.float64)
        stored[:, torch.from_numpy(order[rank:].copy()).long()] = torch.from_numpy(others)[columns.indices]
        is_pivot = torch.zeros(group.columns, dtype=torch.bool)
        is_pivot[columns.values] = True
        blocks = zip(group.layers, stored.split(group.d_out, dim=1), is_pivot.split(group.d_out), strict=True)
        kept = {layer: (block[:, ~mask], mask) for layer, block, mask in blocks}
        return PivotedFactors(
            group=group,
            basis=factors.basis.double() @ coefficients[:, columns.values.to(coefficients.device)],
            coefficients={layer: block for layer, (block, _) in kept.items()},
            pivots={layer: mask for layer, (_, mask) in kept.items()},
        )
