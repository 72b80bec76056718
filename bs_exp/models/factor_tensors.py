"""Stored factors of groups as tensors by name, for the cache, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from bs_exp.protocols import StoredFactors


def tensors_of(stored: StoredFactors) -> dict[str, Tensor]:
    """All that the layers of a group hold: factors, corrections, and what is kept beside them; on the CPU."""
    found = {"basis": stored.basis}
    found |= {f"coefficients/{layer}": c for layer, c in stored.coefficients.items()}
    for layer, (down, up) in stored.corrections.items():
        found |= {f"down/{layer}": down, f"up/{layer}": up}
    found |= {f"kept/{name}": kept for name, kept in stored.kept.items()}
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def with_tensors(stored: StoredFactors, read: Callable[[str], Tensor]) -> StoredFactors:
    """Factors like these, of the values that `read` gives for the names of `tensors_of`."""

    def own(name: str) -> Tensor:
        return read(name).to(stored.basis.device)

    return replace(
        stored,
        basis=own("basis"),
        coefficients={layer: own(f"coefficients/{layer}") for layer in stored.coefficients},
        corrections={layer: (own(f"down/{layer}"), own(f"up/{layer}")) for layer in stored.corrections},
        kept={name: own(f"kept/{name}") for name in stored.kept},
    )
