"""How fast one matrix runs, dense and factorised: `python -m bs_exp.benchmarks.layers --help`.

The layouts are compared at the same stored parameters and at the same rank. Every line also says what the multiply-adds
alone would allow. All variants are timed in turn, several times over, so that a noisy machine is noisy for all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from bs_exp.benchmarks.comparison import (
    FACTORISED,
    Measurement,
    Variant,
    add_arguments,
    check_arguments,
    compared,
    device,
    factorised,
    move,
    report,
)
from bs_exp.evaluation.in_turns import in_turn

# As `torch.compile` calls them: "reduce-overhead" and "max-autotune" record CUDA graphs.
_MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune")


class Each(nn.Module):
    """A module that applies all its layers to the same input."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def variants(
    d_in: int,
    d_out: int,
    ratio: float,
    *,
    dtype: torch.dtype,
    device: torch.device,
    multiple: int = 1,
    group: int = 1,
) -> tuple[Variant, ...]:
    """`group` layers, dense and in each variant of `FACTORISED`, as one module per variant.

    Raises ValueError if the ratio leaves no room for a rank of `multiple`.
    """
    dense = [nn.Linear(d_in, d_out, bias=False, dtype=dtype, device=device) for _ in range(group)]
    count = group * d_in * d_out
    found = [Variant(name="dense", module=Each(dense), rank=None, parameters=count, multiply_adds=count)]
    for name in FACTORISED:
        made = factorised(dense, name, ratio, multiple=multiple)
        found.append(
            Variant(
                name=name,
                module=Each(made.layers),
                rank=made.rank,
                parameters=made.parameters,
                multiply_adds=made.multiply_adds,
            )
        )
    return tuple(found)


def measure(
    found: Sequence[Variant], batch: int, *, rounds: int, seconds: float, mode: str | None
) -> Sequence[Measurement]:
    """Times of all variants on inputs of `batch` tokens, round by round; `mode` is torch.compile's, None is eager."""
    weight = next(found[0].module.parameters())
    x = torch.randn(batch, weight.shape[1], dtype=weight.dtype, device=weight.device)
    torch.compiler.reset()  # all cases together would exceed torch's limit of compiled graphs per function
    calls = [v.module if mode is None else torch.compile(v.module, mode=mode) for v in found]
    times: list[list[float]] = [[] for _ in found]
    with torch.inference_mode():
        for call in calls:  # compiles, and fills caches
            call(x)
        for i in in_turn(len(found), rounds):
            move(found[i].module)
            times[i].append(_time(calls[i], x, seconds))
    return compared(str(batch), found, times)


def _time(call: Callable[[Tensor], list[Tensor]], x: Tensor, seconds: float) -> float:
    """Median seconds per call. The timer synchronises accelerators, and uses as many threads as torch does."""
    call(x)  # after `move` a CUDA graph is recorded anew
    timer = Timer("call(x)", globals={"call": call, "x": x}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=seconds).median)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table; `--json` also writes it with versions and hardware."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-in", type=int, default=4096)
    parser.add_argument("--d-out", type=int, default=4096)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 512], help="tokens per call")
    parser.add_argument("--compile", nargs="?", const=_MODES[2], choices=_MODES, help="time under torch.compile")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.3, help="per variant, batch and round")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    at_least_one = {"d_in": options.d_in, "d_out": options.d_out, "rounds": options.rounds, "batch": min(options.batch)}
    check_arguments(parser, options, **at_least_one)
    if not 0.0 < options.seconds < 3600.0:
        parser.error(f"--seconds must be above 0 and below 3600, got {options.seconds}")
    where = {"dtype": getattr(torch, options.dtype), "device": device(parser, options)}
    sizes = {"multiple": options.multiple, "group": options.group}
    try:
        found = variants(options.d_in, options.d_out, options.ratio, **sizes, **where)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    settings = {"rounds": options.rounds, "seconds": options.seconds, "mode": options.compile}
    measurements = [line for batch in options.batch for line in measure(found, batch, **settings)]
    how = "eager" if options.compile is None else f"torch.compile ({options.compile})"
    report(measurements, options, f"{options.d_in} x {options.d_out}, tokens per call, {how}")


if __name__ == "__main__":
    main()
