"""Memory and seconds of a walk through a model of a real size: `python -m bs_exp.benchmarks.walk --help`.

As `real_size`, but without decompositions, which take the longest: a Llama of random weights is loaded, all Grams of
inputs are gathered, then those of output gradients, logits are computed block by block, and the dense model is saved,
in this process. One number of layers at a
time, since the peak of a process's memory cannot be reset.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bs_exp.benchmarks.real_size import write_model
from bs_exp.cache import Cache
from bs_exp.calibration.group_statistics import calibrate
from bs_exp.models.loading import LocalModel
from bs_exp.models.outputs import logits_of
from bs_exp.models.saving import save_model
from bs_exp.progress import Progress
from bs_exp.runs.environment import peak_memory
from bs_exp.types import CalibrationData, Statistic, TokenWindows
from bs_exp.validation import check_at_least
from bs_exp.workspace import Workspace


def stages(model: Path, scratch: Path, *, offload: str, windows: int, length: int) -> Iterator[str]:
    """The names of the stages, each when it is done."""
    dense = LocalModel(path=str(model), device="cpu", offload=offload).load()
    yield "load"
    ids = torch.randint(97, 123, (windows, length), generator=torch.Generator().manual_seed(0))
    data = CalibrationData(TokenWindows(ids=ids, provenance={"sha256": "random"}), batch_size=1)
    workspace = Workspace(Cache(scratch / "cache"), Progress(quiet=True))
    calibrate(dense, data, needs={Statistic.GRAM}, workspace=workspace)
    yield "calibrate"
    calibrate(dense, data, needs={Statistic.OUTPUT_GRAM}, workspace=workspace)
    yield "calibrate backward"
    for logits in logits_of(dense, [{"input_ids": batch, "use_cache": False} for batch in data.batches]):
        del logits
    yield "logits"
    save_model(dense.module, dense.tokenizer, scratch / "saved")
    yield "save"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bs_exp.benchmarks.walk", description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--d-ff", type=int, default=5632)
    parser.add_argument("--offload", default="disk", choices=["none", "disk"])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens per window")
    given = parser.parse_args(arguments)
    check_at_least(1, layers=given.layers, windows=given.windows, length=given.length)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    print(f"{given.layers} layers of width {given.width} (d_ff {given.d_ff}), offload={given.offload}", flush=True)
    with tempfile.TemporaryDirectory(prefix="bs-exp-walk-") as scratch:
        model = Path(scratch, "model")
        model.mkdir()
        write_model(model, layers=given.layers, width=given.width, d_ff=given.d_ff)
        begun = time.perf_counter()
        for stage in stages(model, Path(scratch), offload=given.offload, windows=given.windows, length=given.length):
            seconds, peak = time.perf_counter() - begun, peak_memory()["process_bytes"]
            print(f"  {stage}: {seconds:.1f} s, peak resident memory {(peak or 0) / 1e9:.2f} GB", flush=True)
            begun = time.perf_counter()


if __name__ == "__main__":
    main()
