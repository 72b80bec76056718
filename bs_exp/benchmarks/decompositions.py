"""Seconds per decomposition beside its floating-point bound: `python -m bs_exp.benchmarks.decompositions --help`.

Every shape is decomposed in turns with roots of both sides of the metric, and with the root of the smaller side alone
and the Gram of the larger one. Seconds are those of the processor, so other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bs_exp.linalg.cholesky import damped_root
from bs_exp.linalg.decomposition import decompose, needs_left_root, needs_right_root
from bs_exp.types import GramRoot, LossUnit, Metric, Spectrum, WeightGroup

_RIDGE, _DAMPING = 1e-12, 1e-4


@dataclass(frozen=True)
class Timing:
    """A group's shape and metric, processor seconds of both ways, and the operations of the faster one (multiplications
    and additions), with the largest relative difference of their losses."""

    d_in: int
    d_out: int
    two_sided: bool
    both_roots: float
    smaller_side: float
    operations: float
    difference: float


def measure(d_in: int, d_out: int, *, two_sided: bool, rounds: int) -> Timing:
    """Medians over rounds, on random Grams whose channels fall by a factor of 1,000 in size."""
    group = WeightGroup("q", (0,), d_in, d_out)
    weight = torch.randn(d_in, d_out, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / d_in**0.5
    inputs, outputs = _gram(d_in, seed=1), _gram(d_out, seed=2) if two_sided else None
    seconds: dict[bool, list[float]] = {True: [], False: []}
    spectra: dict[bool, Spectrum] = {}
    for _ in range(rounds):
        for roots in (True, False):
            start = time.process_time()
            found = decompose(group, weight, _metric(group, inputs, outputs, roots=roots))
            seconds[roots].append(time.process_time() - start)
            spectra[roots] = found.spectrum
    one, other = (spectra[roots].energies.flip(0).cumsum(0) for roots in (True, False))
    return Timing(
        d_in=d_in,
        d_out=d_out,
        two_sided=two_sided,
        both_roots=statistics.median(seconds[True]),
        smaller_side=statistics.median(seconds[False]),
        operations=operations(d_in, d_out, two_sided=two_sided),
        difference=float(((one - other).abs() / other)[1:].max()),
    )


def operations(d_in: int, d_out: int, *, two_sided: bool) -> float:
    """Of a decomposition with the root of the smaller side: products, Cholesky, triangular solves, eigenvectors.

    Eigenvectors of `d x d` count `14/3 d^3`: reduction to a tridiagonal matrix, divide and conquer, and back.
    """
    small, large = min(d_in, d_out), max(d_in, d_out)
    thin, square = 2.0 * small**2 * large, 2.0 * small * large**2
    roots = small**3 / 3.0 + small**3  # and a solve with it
    eigenvectors = 14.0 / 3.0 * small**3
    if d_in <= d_out:  # S W, (S W) G, its product with S W, U^T of both
        return roots + eigenvectors + (square + 4.0 * thin if two_sided else 3.0 * thin)
    # W R, H (W R), its product with W R, V^T of both
    return eigenvectors + square + 3.0 * thin + (thin + roots if two_sided else 0.0)


def multiply_rate(size: int) -> float:
    """Operations per processor second of a product of square matrices in fp64: the bound of everything here."""
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = 0.0
    for _ in range(3):
        start = time.process_time()
        _ = matrix @ matrix
        best = max(best, 2.0 * size**3 / max(time.process_time() - start, 1e-9))
    return best


def _metric(group: WeightGroup, inputs: Tensor, outputs: Tensor | None, *, roots: bool) -> Metric:
    left, ridge = damped_root(inputs, ridge=_RIDGE, needed=roots or needs_left_root(group))
    if outputs is None:
        return Metric(whitener=left, ridge=ridge, unit=LossUnit.OUTPUT_NORM)
    root, _ = damped_root(outputs, ridge=_DAMPING, needed=roots or needs_right_root(group))
    right = root if isinstance(root, GramRoot) else root.mT.contiguous()
    return Metric(whitener=left, ridge=ridge, right={0: right}, unit=LossUnit.NATS)


def _gram(channels: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(channels + channels // 8 + 1, channels, generator=generator, dtype=torch.float64)
    rows *= torch.logspace(0, -3, channels, dtype=torch.float64)
    return rows.mT @ rows


def _cases(width: int, d_ff: int) -> Iterator[tuple[int, int, bool]]:
    for two_sided in (False, True):
        for d_in, d_out in ((width, width), (width, d_ff), (d_ff, width)):
            yield d_in, d_out, two_sided


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048, help="of the hidden states (default: 2048)")
    parser.add_argument("--d-ff", type=int, default=5632, help="between the matrices of the MLP (default: 5632)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians are shown (default: 3)")
    options = parser.parse_args(arguments)
    rate = multiply_rate(options.width)
    print(f"fp64 products: {rate / 1e9:.1f} GFLOP per processor second, {torch.get_num_threads()} threads", flush=True)
    print("d_in  d_out  metric     both roots  smaller side  bound  difference of losses", flush=True)
    for d_in, d_out, two_sided in _cases(options.width, options.d_ff):
        found = measure(d_in, d_out, two_sided=two_sided, rounds=options.rounds)
        name = "two-sided" if two_sided else "gram"
        print(
            f"{d_in:<5} {d_out:<6} {name:<10} {found.both_roots:>8.2f} s {found.smaller_side:>11.2f} s "
            f"{found.operations / rate:>5.2f} s  {found.difference:.0e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
