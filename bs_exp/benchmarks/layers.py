"""How fast one matrix runs, dense and factorised: `python -m bs_exp.benchmarks.layers --help`.

The layouts are compared at the same stored parameters and at the same rank. Every line also says what the multiply-adds
alone would allow. All variants are timed in turn, several times over, so that a noisy machine is noisy for all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from bs_exp import environment
from bs_exp.choices import largest_rank, parameter_budget
from bs_exp.hf_plugin import PivotedLinear, SharedLinear, pack_bits
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.types import WeightGroup


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One variant at one batch: seconds per call (median, fastest and slowest round) and what they are worth."""

    variant: str
    rank: int | None
    parameters: int
    batch: int
    median: float
    fastest: float
    slowest: float
    speedup: float
    bound: float


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compute `x W`, and its multiply-adds per token."""

    name: str
    module: nn.Module
    rank: int | None
    parameters: int
    multiply_adds: int


def variants(group: WeightGroup, ratio: float, *, dtype: torch.dtype, device: torch.device) -> tuple[Variant, ...]:
    """Dense, plain and pivoted at the same stored parameters, and pivoted at the plain layout's rank.

    Raises ValueError if the ratio leaves no room for one component.
    """
    plain, pivoted = PlainLayout(), PivotedLayout()
    budget = parameter_budget(group.parameters, ratio)
    same, more = largest_rank(group, budget, plain), largest_rank(group, budget, pivoted)
    if same < 1:
        raise ValueError(f"ratio {ratio} leaves no room for one component of a {group.d_in} x {group.d_out} matrix.")
    dense = nn.Linear(group.d_in, group.d_out, bias=False, dtype=dtype, device=device)
    found = [
        Variant(name="dense", module=dense, rank=None, parameters=group.parameters, multiply_adds=group.parameters)
    ]
    kinds: tuple[tuple[str, int, PlainLayout | PivotedLayout], ...] = (
        ("plain", same, plain),
        ("pivoted, same budget", more, pivoted),
        ("pivoted, same rank", same, pivoted),
    )
    for name, rank, layout in kinds:
        count = rank if isinstance(layout, PivotedLayout) else 0
        basis = _random(rank, group.d_in, dtype, device)
        own = _random(group.d_out - count, rank, dtype, device)
        if count:
            chosen = torch.zeros(group.d_out, dtype=torch.bool, device=device)
            chosen[torch.randperm(group.d_out, generator=torch.Generator().manual_seed(0))[:count]] = True
            module: nn.Module = PivotedLinear.replacing(dense, basis, own, pack_bits(chosen), start=0, count=count)
        else:
            module = SharedLinear.replacing(dense, basis, own)
        operations = rank * (group.d_in + group.d_out - count)
        parameters = layout.parameters(group, rank)
        found.append(Variant(name=name, module=module, rank=rank, parameters=parameters, multiply_adds=operations))
    return tuple(found)


def measure(
    found: Sequence[Variant], batch: int, *, rounds: int, seconds: float, compiled: bool
) -> Iterator[Measurement]:
    """Times all variants on inputs of `batch` tokens, round by round."""
    weight = next(found[0].module.parameters())
    x = torch.randn(batch, weight.shape[1], dtype=weight.dtype, device=weight.device)
    calls = [torch.compile(v.module, mode="max-autotune-no-cudagraphs") if compiled else v.module for v in found]
    times: list[list[float]] = [[] for _ in found]
    with torch.inference_mode():
        for call in calls:  # compiles, and fills caches
            call(x)
        for _ in range(rounds):
            for call, seen in zip(calls, times, strict=True):
                seen.append(_time(call, x, seconds))
    dense = statistics.median(times[0])
    for variant, seen in zip(found, times, strict=True):
        median = statistics.median(seen)
        yield Measurement(
            variant=variant.name,
            rank=variant.rank,
            parameters=variant.parameters,
            batch=batch,
            median=median,
            fastest=min(seen),
            slowest=max(seen),
            speedup=dense / median,
            bound=found[0].multiply_adds / variant.multiply_adds,
        )


def _time(call: Callable[[Tensor], Tensor], x: Tensor, seconds: float) -> float:
    """Median seconds per call. The timer synchronises accelerators, and takes the threads that torch has."""
    timer = Timer("call(x)", globals={"call": call, "x": x}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=seconds).median)


def _random(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    values = torch.randn(rows, columns, device=device) / columns**0.5
    return nn.Parameter(values.to(dtype), requires_grad=False)


def _table(measurements: Sequence[Measurement], title: str) -> Table:
    table = Table("tokens", "variant", "rank", "parameters", "ms", "ms, range", "speed-up", "bound", title=title)
    for column in table.columns:
        column.no_wrap = True
    previous = None
    for m in measurements:
        if previous is not None and m.batch != previous:
            table.add_section()
        previous = m.batch
        table.add_row(
            str(m.batch),
            m.variant,
            "-" if m.rank is None else str(m.rank),
            f"{m.parameters:,}",
            f"{m.median * 1e3:.3f}",
            f"{m.fastest * 1e3:.3f} - {m.slowest * 1e3:.3f}",
            f"{m.speedup:.2f}",
            f"{m.bound:.2f}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table; `--json` also writes it with versions and hardware."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-in", type=int, default=4096)
    parser.add_argument("--d-out", type=int, default=4096)
    parser.add_argument("--ratio", type=float, default=0.8, help="share of the parameters to keep")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 512], help="tokens per call")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="time the modules under torch.compile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="per variant, batch and round")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    if not 0.0 < options.ratio < 1.0:
        parser.error(f"--ratio must be between 0 and 1, got {options.ratio}")
    if min(options.d_in, options.d_out, options.rounds, *options.batch) < 1:
        parser.error("--d-in, --d-out, --rounds and --batch must be at least 1")
    group = WeightGroup("matrix", (0,), options.d_in, options.d_out)
    try:
        found = variants(group, options.ratio, dtype=getattr(torch, options.dtype), device=torch.device(options.device))
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    measurements = [
        measurement
        for batch in options.batch
        for measurement in measure(
            found, batch, rounds=options.rounds, seconds=options.seconds, compiled=options.compile
        )
    ]
    how = "torch.compile" if options.compile else "eager"
    Console(width=110).print(
        _table(
            measurements,
            f"{options.d_in} x {options.d_out}, {options.ratio:g} kept, {options.dtype}, {options.device}, {how}",
        )
    )
    if options.json:
        record: Mapping[str, object] = {
            "settings": {key: str(value) if key == "json" else value for key, value in vars(options).items()},
            "measurements": [asdict(m) for m in measurements],
            "versions": environment.versions(),
            "hardware": environment.hardware(),
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
