"""What the benchmarks have in common: a layer of every layout, times with their spread, a table, a record."""

from __future__ import annotations

import json
import os
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bs_exp import environment
from bs_exp.choices import largest_rank, parameter_budget
from bs_exp.hf_plugin import PivotedLinear, SharedLinear, pack_bits
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.types import WeightGroup

PLAIN, SAME_BUDGET, SAME_RANK = "plain", "pivoted, same budget", "pivoted, same rank"
LAYOUTS = (PLAIN, SAME_BUDGET, SAME_RANK)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One variant in one case: seconds (median, fastest and slowest round) and what they are worth.

    `bound` is the speed-up that the multiply-adds alone would allow.
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


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compute the same function: its stored parameters, and its multiply-adds per token."""

    name: str
    module: nn.Module
    rank: int | None
    parameters: int
    multiply_adds: int


def factorised(dense: nn.Linear, name: str, ratio: float, *, multiple: int = 1) -> Variant:
    """A random layer in the place of `dense`: `PLAIN` or `SAME_BUDGET` at `ratio`, or `SAME_RANK` as the plain one.

    The rank is the largest `multiple` within the budget. Raises ValueError if there is none.
    """
    group = WeightGroup("matrix", (0,), dense.in_features, dense.out_features)
    plain, pivoted = PlainLayout(), PivotedLayout()
    budget = parameter_budget(group.parameters, ratio)
    rank = largest_rank(group, budget, pivoted if name == SAME_BUDGET else plain) // multiple * multiple
    if rank < 1:
        raise ValueError(f"ratio {ratio} leaves no room for rank {multiple} in a {group.d_in} x {group.d_out} matrix.")
    count = 0 if name == PLAIN else rank
    basis, own = _random(dense, rank, group.d_in), _random(dense, group.d_out - count, rank)
    if name == PLAIN:
        module: nn.Module = SharedLinear.replacing(dense, basis, own)
        parameters = plain.parameters(group, rank)
    else:
        chosen = torch.zeros(group.d_out, dtype=torch.bool, device=dense.weight.device)
        chosen[torch.randperm(group.d_out, generator=torch.Generator().manual_seed(0))[:count]] = True
        module = PivotedLinear.replacing(dense, basis, own, pack_bits(chosen), start=0, count=count)
        parameters = pivoted.parameters(group, rank)
    operations = rank * (group.d_in + group.d_out - count)
    return Variant(name=name, module=module, rank=rank, parameters=parameters, multiply_adds=operations)


def move(module: nn.Module) -> None:
    """New copies of all parameters: where a tensor lies in memory is worth some percent of the time on a CPU."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


def compared(case: str, variants: Sequence[Variant], times: Sequence[Sequence[float]]) -> list[Measurement]:
    """The `times` of every variant, in seconds by round, against the first one's."""
    reference = statistics.median(times[0])
    return [
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
        )
        for variant, seen in zip(variants, times, strict=True)
    ]


def add_arguments(parser: ArgumentParser) -> None:
    """The settings of every benchmark."""
    parser.add_argument("--ratio", type=float, default=0.8, help="share of the parameters to keep")
    parser.add_argument("--multiple", type=int, default=1, help="ranks are multiples of this")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write")


def check_arguments(parser: ArgumentParser, options: Namespace, **at_least_one: int) -> None:
    """Ends the command with its usage and a message if a setting cannot be, or the file not be written."""
    if not 0.0 < options.ratio < 1.0:
        parser.error(f"--ratio must be between 0 and 1, got {options.ratio}")
    for name, value in {**at_least_one, "multiple": options.multiple}.items():
        if value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.json and (options.json.is_dir() or not os.access(options.json.absolute().parent, os.W_OK)):
        parser.error(f"--json {options.json} cannot be written: name a file in a folder that exists")


def device(parser: ArgumentParser, options: Namespace) -> torch.device:
    """The device, if something can be computed there; else the command ends with a message."""
    try:
        found = torch.device(options.device)
        torch.ones(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        parser.error(f"--device {options.device} cannot be used here: {str(error).splitlines()[0]}")
    return found


def report(measurements: Sequence[Measurement], options: Namespace, title: str) -> None:
    """Prints the table, and writes the record if a file is asked for."""
    multiple = f", ranks in {options.multiple}s" if options.multiple > 1 else ""
    title = f"{title}, {options.ratio:g} kept{multiple}, {options.dtype}, {options.device}"
    Console(width=110).print(_table(measurements, title))
    if options.json:
        record: Mapping[str, object] = {
            "settings": {key: str(value) if key == "json" else value for key, value in vars(options).items()},
            "measurements": [asdict(m) for m in measurements],
            "versions": environment.versions(),
            "hardware": environment.hardware(),
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _table(measurements: Sequence[Measurement], title: str) -> Table:
    with_ranks = any(m.rank is not None for m in measurements)  # a whole model has no single one
    ranks = ["rank"] if with_ranks else []
    table = Table("", "variant", *ranks, "parameters", "ms", "ms, range", "speed-up", "bound", title=title)
    for column in table.columns:
        column.no_wrap = True
    previous = None
    for m in measurements:
        if previous is not None and m.case != previous:
            table.add_section()
        previous = m.case
        rank = ["-" if m.rank is None else str(m.rank)] if with_ranks else []
        table.add_row(
            m.case,
            m.variant,
            *rank,
            f"{m.parameters:,}",
            f"{m.median * 1e3:.3f}",
            f"{m.fastest * 1e3:.3f} - {m.slowest * 1e3:.3f}",
            f"{m.speedup:.2f}",
            f"{m.bound:.2f}",
        )
    return table


def _random(like: nn.Linear, rows: int, columns: int) -> nn.Parameter:
    values: Tensor = torch.randn(rows, columns, device=like.weight.device) / columns**0.5
    return nn.Parameter(values.to(like.weight.dtype), requires_grad=False)
