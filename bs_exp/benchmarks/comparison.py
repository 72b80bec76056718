"""Shared by the benchmarks: layers of every layout, statistics of times, a table, a record."""

from __future__ import annotations

import json
import os
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bs_exp.evaluation.in_turns import median_interval
from bs_exp.files import write_file
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.linalg.pivoting import pivots_are_inputs
from bs_exp.models.modeling_basis_sharing import FactorisedLinear, empty_layers, kept_of, pack_bits
from bs_exp.protocols import Layout
from bs_exp.rank_budget import largest_rank, parameter_budget
from bs_exp.runs import environment
from bs_exp.types import WeightGroup

PLAIN, SAME_BUDGET, SAME_RANK = "plain", "pivoted, same budget", "pivoted, same rank"
FACTORISED = (PLAIN, SAME_BUDGET, SAME_RANK)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The times of one variant in one case, in seconds (median, fastest and slowest round), and its relative speed.

    `speedup` is over the dense variant; `bound` is the speed-up that the number of multiply-adds alone would allow.
    `of_plain` is the speed relative to the plain layout: the median over rounds, each against the plain layout in the
    same round. `of_plain_interval` is the 95 % confidence interval of that median (None with fewer than 6 rounds).
    """

    case: str
    variant: str
    rank: int | None
    parameters: int
    median: float
    fastest: float
    slowest: float
    speedup: float
    bound: float
    of_plain: float
    of_plain_interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compute the same function: its stored parameters, and its multiply-adds per token."""

    name: str
    module: nn.Module
    rank: int | None
    parameters: int
    multiply_adds: int


@dataclass(frozen=True, kw_only=True)
class RandomGroup:
    """Factorised layers with random numbers that share a basis; parameters and multiply-adds are of all of them."""

    layers: Sequence[FactorisedLinear]
    rank: int
    parameters: int
    multiply_adds: int


def factorised(dense: Sequence[nn.Linear], name: str, ratio: float, *, multiple: int = 1) -> RandomGroup:
    """Random factorised layers in place of dense ones of one shape; `name` is the variant.

    `PLAIN` and `SAME_BUDGET` keep `ratio` of the parameters; `SAME_RANK` is pivoted at the rank of `PLAIN`. The rank is
    the largest multiple of `multiple` within the budget. Raises ValueError if there is none.
    """
    group = WeightGroup("matrix", tuple(range(len(dense))), dense[0].in_features, dense[0].out_features)
    layout: Layout = PlainLayout() if name == PLAIN else PivotedLayout()
    budget = parameter_budget(group.parameters, ratio)
    rank = largest_rank(group, budget, layout if name == SAME_BUDGET else PlainLayout()) // multiple * multiple
    if rank < 1:
        shapes = f"{group.size} of {group.d_in} x {group.d_out}"
        raise ValueError(f"ratio {ratio} leaves no room for rank {multiple} in a group of {shapes}.")
    layers = empty_layers(layout.name, dense, [str(i) for i in group.layers], rank)
    factors = {id(factor): factor for layer in layers for factor in (layer.basis, layer.weight)}.values()
    for factor in factors:
        nn.init.normal_(factor.requires_grad_(False), std=max(factor.shape[1], 1) ** -0.5)
    for layer in layers:
        for kept in kept_of(layer):
            setattr(layer, kept, _RANDOM[kept](group, rank).to(layer.weight.device))
        layer.refresh()
    return RandomGroup(
        layers=layers,
        rank=rank,
        parameters=layout.parameters(group, rank),
        multiply_adds=sum(layer.basis.numel() + layer.weight.numel() for layer in layers),
    )


def _random_pivots(group: WeightGroup, rank: int) -> Tensor:
    """Bits of `rank` features, the same for every layer: to find the best ones would take longer than all the rest."""
    features = group.d_in if pivots_are_inputs(group) else group.d_out
    chosen = torch.zeros(features, dtype=torch.bool)
    chosen[torch.randperm(features, generator=torch.Generator().manual_seed(0))[:rank]] = True
    return pack_bits(chosen)


# What layouts keep beside the factors -> random contents.
_RANDOM: Mapping[str, Callable[[WeightGroup, int], Tensor]] = {"pivots": _random_pivots}


def move(module: nn.Module) -> None:
    """Copies all parameters to new memory: a tensor's address changes its time on a CPU by some percent."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


def compared(case: str, variants: Sequence[Variant], times: Sequence[Sequence[float]]) -> list[Measurement]:
    """Measurements from the `times` of every variant, in seconds by round; the first variant is the dense one."""
    reference = statistics.median(times[0])
    plain = times[[variant.name for variant in variants].index(PLAIN)]
    found = []
    for variant, seen in zip(variants, times, strict=True):
        ratios = [theirs / own for theirs, own in zip(plain, seen, strict=True)]
        found.append(
            Measurement(
                case=case,
                variant=variant.name,
                rank=variant.rank,
                parameters=variant.parameters,
                median=statistics.median(seen),
                fastest=min(seen),
                slowest=max(seen),
                speedup=reference / statistics.median(seen),
                bound=variants[0].multiply_adds / variant.multiply_adds,
                of_plain=statistics.median(ratios),
                of_plain_interval=median_interval(ratios),
            )
        )
    return found


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options that every benchmark has."""
    parser.add_argument("--ratio", type=float, default=0.8, help="share of the parameters to keep")
    parser.add_argument("--group", type=int, default=1, help="matrices of a type that share a basis")
    parser.add_argument("--multiple", type=int, default=1, help="ranks are multiples of this")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write")


def check_arguments(parser: ArgumentParser, options: Namespace, **at_least_one: int) -> None:
    """Ends the command with its usage and a message if an option is out of range, or `--json` cannot be written."""
    if not 0.0 < options.ratio < 1.0:
        parser.error(f"--ratio must be between 0 and 1, got {options.ratio}")
    for name, value in {**at_least_one, "group": options.group, "multiple": options.multiple}.items():
        if value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.json and (options.json.is_dir() or not os.access(options.json.absolute().parent, os.W_OK)):
        parser.error(f"--json {options.json} cannot be written: name a file in a folder that exists")


def device(parser: ArgumentParser, options: Namespace) -> torch.device:
    """The device of `--device`; if nothing can be computed there, the command ends with a message."""
    try:
        found = torch.device(options.device)
        torch.ones(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        parser.error(f"--device {options.device} cannot be used here: {str(error).splitlines()[0]}")
    return found


def report(measurements: Sequence[Measurement], options: Namespace, title: str) -> None:
    """Prints the table, and writes the record if `--json` names a file."""
    multiple = f", ranks in {options.multiple}s" if options.multiple > 1 else ""
    shared = f", groups of {options.group}" if options.group > 1 else ""
    title = f"{title}, {options.ratio:g} kept{shared}{multiple}, {options.dtype}, {options.device}"
    Console(width=118).print(_table(measurements, title))
    if options.json:
        record: Mapping[str, object] = {
            "settings": {key: str(value) if key == "json" else value for key, value in vars(options).items()},
            "measurements": [asdict(m) for m in measurements],
            "versions": environment.versions(),
            "hardware": environment.hardware(),
        }
        write_file(options.json, json.dumps(record, indent=2) + "\n")


def _table(measurements: Sequence[Measurement], title: str) -> Table:
    with_ranks = any(m.rank is not None for m in measurements)  # a whole model has no single one
    ranks = ["rank"] if with_ranks else []
    columns = ["", "variant", *ranks, "parameters", "ms", "speed-up", "bound", "x plain", "95 %"]
    table = Table(*columns, title=title)
    for column in table.columns:
        column.no_wrap = True
    previous = None
    for m in measurements:
        if previous is not None and m.case != previous:
            table.add_section()
        previous = m.case
        rank = ["-" if m.rank is None else str(m.rank)] if with_ranks else []
        interval = "{:.3f} - {:.3f}".format(*m.of_plain_interval) if m.of_plain_interval else "-"
        if m.variant == PLAIN:
            interval = ""
        table.add_row(
            m.case,
            m.variant,
            *rank,
            f"{m.parameters:,}",
            f"{m.median * 1e3:.3f}",
            f"{m.speedup:.2f}",
            f"{m.bound:.2f}",
            f"{m.of_plain:.3f}",
            interval,
        )
    return table
