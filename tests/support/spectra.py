"""Problems for allocators: groups with chosen spectra."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from bs_exp.layout.plain import PlainLayout
from bs_exp.protocols import AllocationProblem, Layout
from bs_exp.types import LayerProfile, LossUnit, Spectrum, WeightGroup


def group(matrix: str, *layers: int, d_in: int = 40, d_out: int = 40) -> WeightGroup:
    return WeightGroup(matrix, layers, d_in, d_out)


def decaying(member: WeightGroup, exponent: float, size: float = 100.0) -> Spectrum:
    """Singular values `size * i^-exponent`."""
    values = size * torch.arange(1, member.full_rank + 1, dtype=torch.float64) ** -exponent
    return Spectrum(group=member, singular_values=values, energies=values.square(), ridge=0.0)


def problem(
    spectra: Iterable[Spectrum] | Mapping[WeightGroup, float],
    ratio: float,
    profile: LayerProfile | None = None,
    layout: Layout | None = None,
) -> AllocationProblem:
    """Spectra as they are, or groups with the exponents of their decay."""
    if isinstance(spectra, Mapping):
        spectra = [decaying(member, exponent) for member, exponent in spectra.items()]
    return AllocationProblem(tuple(spectra), ratio, layout or PlainLayout(), profile)


def in_nats(member: WeightGroup, energies: list[float]) -> Spectrum:
    values = torch.tensor(energies, dtype=torch.float64)
    return Spectrum(group=member, singular_values=values.sqrt(), energies=values, ridge=0.0, unit=LossUnit.NATS)
