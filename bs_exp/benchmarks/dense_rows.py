"""What it would gain to keep some input channels dense: `python -m bs_exp.benchmarks.dense_rows --help`.

CPSVD and Duo-SVD leave the channels with the largest error as they are and factorise the rest. With the rows C of a
weight free, the others R are decomposed in the Schur complement of the Gram, `G_RR - G_RC G_CC^-1 G_CR`: in what the
rows C cannot make up for. Every kept row costs `d_out` parameters, which the rank of the rest has to spare. Predicted
losses at equal stored parameters, every matrix on its own, in the metric of `whitening=gram`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bs_exp.calibration.gather import gather
from bs_exp.corpora.python_docs import PythonDocs
from bs_exp.corpora.text_files import TextFiles
from bs_exp.corpora.windows import CalibrationSet
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.linalg.cholesky import cholesky_whitener
from bs_exp.linalg.decomposition import decompose, truncate
from bs_exp.models.architecture import weight_of
from bs_exp.models.loading import DemoModel, LocalModel
from bs_exp.progress import Progress
from bs_exp.protocols import Layout
from bs_exp.rank_budget import largest_rank, parameter_budget
from bs_exp.types import CalibrationData, LossUnit, Metric, Statistic, WeightGroup

_RIDGE = 1e-10
# How many rows are tried; the best number is taken, 0 among them.
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True)
class Gain:
    """Squared errors of a matrix's outputs, as shares of those of dropping it: at the rank of a budget, and with the
    best number of dense rows in the same budget."""

    without: float
    with_rows: float
    rows: int


def gain(weight: Tensor, gram: Tensor, ratio: float, layout: Layout) -> Gain:
    """What dense rows gain for `weight [d_in, d_out]` whose inputs have a Gram `[d_in, d_in]`, both in fp64.

    Rows are taken in the order of their error at the plain rank, weighted by the energy of their channel.
    """
    d_in, d_out = weight.shape
    budget = parameter_budget(weight.numel(), ratio)
    whole = float((weight * (gram @ weight)).sum())
    without = error = _error(weight, gram, budget, layout)
    rows = 0
    order = ((weight - _truncated(weight, gram, budget)).square().sum(1) * gram.diagonal()).argsort(descending=True)
    for count in _ROWS:
        if count >= d_in or count * d_out >= budget:
            break
        kept, rest = order[:count], order[count:]
        shared = gram[rest][:, kept]
        schur = gram[rest][:, rest] - shared @ torch.linalg.solve(gram[kept][:, kept], shared.mT)
        found = _error(weight[rest], schur, budget - count * d_out, layout)
        if found < error:
            error, rows = found, count
    return Gain(without / whole, error / whole, rows)


def _group(weight: Tensor) -> WeightGroup:
    return WeightGroup("weight", (0,), *weight.shape)


def _metric(gram: Tensor) -> Metric:
    whitener, ridge = cholesky_whitener(gram, ridge=_RIDGE)
    return Metric(whitener=whitener, ridge=ridge, unit=LossUnit.OUTPUT_NORM)


def _error(weight: Tensor, gram: Tensor, budget: int, layout: Layout) -> float:
    group = _group(weight)
    found = decompose(group, weight, _metric(gram)).spectrum
    return found.loss(largest_rank(group, budget, layout)) ** 2


def _truncated(weight: Tensor, gram: Tensor, budget: int) -> Tensor:
    group = _group(weight)
    rank = max(1, largest_rank(group, budget, PlainLayout()))
    factors = truncate(decompose(group, weight, _metric(gram)), rank)
    return factors.basis @ factors.coefficients[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bs_exp.benchmarks.dense_rows", description=__doc__)
    parser.add_argument("--model", help="a checkpoint folder (default: the demo model)")
    parser.add_argument("--text", help="a file of calibration text (default: Python documentation)")
    parser.add_argument("--windows", type=int, default=32, help="of 512 tokens, drawn with seed 0")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.6, 0.5], help="retained shares")
    given = parser.parse_args(arguments)
    model = DemoModel(device="cpu") if given.model is None else LocalModel(path=given.model, device="cpu")
    corpus = PythonDocs(split="calibration") if given.text is None else TextFiles(files=[given.text])
    dense = model.load()
    calibration = CalibrationSet(
        corpus=corpus, num_sequences=given.windows, sequence_length=512, order="random", batch_size=8, seed=0,
        special_tokens=False,
    )  # fmt: skip
    data = CalibrationData(calibration.windows(dense.tokenizer), batch_size=8)
    progress = Progress(quiet=True)
    grams = {name: found["gram"] for _, name, found in gather(dense, data, {Statistic.GRAM}, progress=progress)}
    print("kept  layout   error  with dense rows  rows (median)   errors: mean share of the outputs' energy")
    for ratio in given.ratios:
        for layout in (PlainLayout(), PivotedLayout()):
            gains = [
                gain(weight_of(dense.module, m).detach().double(), grams[m.input_site].double(), ratio, layout)
                for m in dense.architecture.matrices
            ]
            without, with_rows = (
                sum(found) / len(gains) for found in zip(*((g.without, g.with_rows) for g in gains), strict=True)
            )
            rows = sorted(found.rows for found in gains)[len(gains) // 2]
            print(f"{ratio:<5} {layout.name:<8} {without:.4f} {with_rows:>15.4f}  {rows:>6}", flush=True)


if __name__ == "__main__":
    main()
