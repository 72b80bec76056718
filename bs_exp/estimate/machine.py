"""How fast this machine is: rates that a few seconds of measuring give, and the time that work takes at them."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bs_exp.cache import content_key
from bs_exp.estimate.ledger import Decomposition, Work
from bs_exp.files import write_file

FILE = "machine.json"
_FORMAT = 2
_PRODUCT, _EIGENVECTORS, _COPY, _DISK, _CALLS = 1024, 768, 2**24, 2**26, 2000
_SECONDS = 0.25
# Floating-point operations of a factorisation in units of rows x columns^2, with more rows than columns, and how fast
# they run beside products.
_FACTORISATIONS: Mapping[str, tuple[float, float]] = {
    "cholesky": (1 / 3, 0.5),
    "qr": (2.0, 0.4),
    "svd": (20.0, 0.2),
    # QR with column pivoting, which is bound by memory.
    "pivoted qr": (2.0, 0.1),
}
# Those of a solve in units of rows^2 x columns of its right sides, and of rows^3 for the factorisation in it.
_SOLVES: Mapping[str, tuple[float, float, float]] = {
    "triangular solve": (1.0, 0.0, 0.7),
    "cholesky solve": (2.0, 0.0, 0.7),
    "solve": (2.0, 2 / 3, 0.6),
}


@dataclass(frozen=True)
class Machine:
    """Rates of one device: products by dtype (operations per second), eigenvectors (n^3 per second, fp64), memory and
    disk (bytes per second), and the seconds of an operation on tensors of a few numbers."""

    products: Mapping[str, float]
    eigenvectors: float
    memory: float
    disk: float
    call: float

    def seconds(self, work: Work) -> float:
        """The time of work whose operations follow one another."""
        products = sum(count / self._rate(dtype) for (_, dtype), count in work.flops.items())
        factorised = sum(self._factorisation(found) * n for (_, found), n in work.decompositions.items())
        return products + factorised + sum(work.moved.values()) / self.memory + work.calls * self.call

    def _rate(self, dtype: torch.dtype) -> float:
        return self.products.get(_name(dtype), self.products["float32"])

    def _factorisation(self, found: Decomposition) -> float:
        small = min(found.rows, found.columns)
        if found.kind == "eigenvectors":
            return small**3 / self.eigenvectors
        if found.kind in _SOLVES:
            of_columns, of_rows, share = _SOLVES[found.kind]
            count = found.rows**2 * (of_columns * found.columns + of_rows * found.rows)
            return count / (share * self.products["float64"])
        operations, share = _FACTORISATIONS[found.kind]
        return operations * max(found.rows, found.columns) * small**2 / (share * self.products["float64"])


def measured(folder: Path | None, device: torch.device, dtype: torch.dtype) -> Machine:
    """The rates of this machine, measured now, and kept in the folder for the estimates of runs."""
    names = {torch.float32, torch.float64, dtype}
    found = Machine(
        products={_name(each): _product_rate(device, each) for each in names},
        eigenvectors=_eigenvector_rate(device),
        memory=_memory_rate(device),
        disk=_disk_rate(folder),
        call=_call_seconds(device),
    )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"format": _FORMAT, "machine": _identity(device, dtype), **asdict(found)}
        write_file(folder / FILE, json.dumps(content, indent=2) + "\n")
    return found


def known(folder: Path | None, device: torch.device, dtype: torch.dtype) -> Machine | None:
    """The rates that were measured before on this very machine, with as many threads; None if there are none."""
    if folder is None:
        return None
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if content.pop("format") != _FORMAT or content.pop("machine") != _identity(device, dtype):
            return None
        return Machine(**content)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _identity(device: torch.device, dtype: torch.dtype) -> str:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return content_key(
        host=os.uname().nodename if hasattr(os, "uname") else None,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        device=device.type,
        gpu=gpu,
        dtype=_name(dtype),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _best(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest repeat, within a quarter of a second, after one to warm up."""
    run()
    start, best = time.perf_counter(), float("inf")
    while True:
        _wait(device)
        before = time.perf_counter()
        run()
        _wait(device)
        now = time.perf_counter()
        best = min(best, now - before)
        if now - start > _SECONDS:
            return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    one = torch.ones(_PRODUCT, _PRODUCT, dtype=dtype, device=device)
    # As a layer multiplies: where a CPU has no instructions for a dtype, other products are slower still.
    return 2.0 * _PRODUCT**3 / _best(lambda: torch.nn.functional.linear(one, one), device)


def _eigenvector_rate(device: torch.device) -> float:
    made = torch.randn(_EIGENVECTORS, _EIGENVECTORS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = (made @ made.mT).to(device)
    return float(_EIGENVECTORS**3 / _best(lambda: torch.linalg.eigh(gram), device))


def _memory_rate(device: torch.device) -> float:
    values = torch.ones(_COPY, device=device)
    other = torch.empty_like(values)
    return 2 * values.nbytes / _best(lambda: other.copy_(values), device)


def _disk_rate(folder: Path | None) -> float:
    """Bytes per second of one file of 64 MiB, written through to the disk."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    content = bytes(_DISK)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return _DISK / (time.perf_counter() - start)


def _call_seconds(device: torch.device) -> float:
    few = torch.ones(8, device=device)

    def calls() -> None:
        for _ in range(_CALLS):
            few.add(1.0)

    # A call of the code around an operation takes about as long as the operation itself.
    return 2.0 * _best(calls, device) / _CALLS
