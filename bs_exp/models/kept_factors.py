"""The factors of a compressed model in the cache, so that an update that has finished is not repeated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bs_exp.cache import Cache, content_key
from bs_exp.models.surgery import exchange_factors, factors_of
from bs_exp.protocols import StoredFactors
from bs_exp.types import Architecture, WeightGroup


@dataclass(frozen=True, eq=False)
class KeptFactors:
    """Factors of groups under one key of the cache, and numbers that were reported of them.

    Every group has an entry of its own, so that no more than one is in memory; that of the numbers is stored last.
    """

    compressed: PreTrainedModel
    architecture: Architecture
    cache: Cache
    kind: str
    key: str

    def found(self, groups: Sequence[WeightGroup], names: Sequence[str]) -> dict[str, list[float]] | None:
        """Puts the factors into the model if all are there, intact; the numbers of these names, or None."""
        if (numbers := self.cache.find(self.kind, self.key)) is None:
            return None
        entries = {group: self.cache.find(self.kind, self._of(group)) for group in groups}
        # Before any is exchanged: one that is damaged counts as absent.
        kept = {group: entry for group, entry in entries.items() if entry is not None}
        if len(kept) < len(groups):
            return None
        for group, entry in kept.items():
            moved = _with_tensors(factors_of(self.compressed, self.architecture, group), entry.tensor)
            exchange_factors(self.compressed, self.architecture, moved, self.cache.folder)
        return {name: numbers.tensor(name).tolist() for name in names}

    def keep(self, groups: Sequence[WeightGroup], numbers: Mapping[str, Sequence[float]]) -> None:
        """Stores the factors as they are, and the numbers by name."""
        for group in groups:
            present = factors_of(self.compressed, self.architecture, group)
            self.cache.store(self.kind, self._of(group), _tensors_of(present))
        found = {name: torch.tensor(list(values), dtype=torch.float64) for name, values in numbers.items()}
        self.cache.store(self.kind, self.key, found)

    def _of(self, group: WeightGroup) -> str:
        return content_key(key=self.key, group=asdict(group))


def _tensors_of(stored: StoredFactors) -> dict[str, Tensor]:
    """All that the layers of a group hold: factors, corrections, and what is kept beside them; on the CPU."""
    found = {"basis": stored.basis}
    found |= {f"coefficients/{layer}": c for layer, c in stored.coefficients.items()}
    for layer, (down, up) in stored.corrections.items():
        found |= {f"down/{layer}": down, f"up/{layer}": up}
    found |= {f"kept/{name}": kept for name, kept in stored.kept.items()}
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def _with_tensors(stored: StoredFactors, read: Callable[[str], Tensor]) -> StoredFactors:
    """Factors like these, of the values that `read` gives for the names of `_tensors_of`."""

    def own(name: str) -> Tensor:
        return read(name).to(stored.basis.device)

    return replace(
        stored,
        basis=own("basis"),
        coefficients={layer: own(f"coefficients/{layer}") for layer in stored.coefficients},
        corrections={layer: (own(f"down/{layer}"), own(f"up/{layer}")) for layer in stored.corrections},
        kept={name: own(f"kept/{name}") for name in stored.kept},
    )
