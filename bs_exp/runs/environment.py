"""The environment of a run: versions, hardware, memory, and the source it runs from, as plain data for the record."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("bs-exp", "torch", "transformers", "datasets", "lm-eval", "safetensors", "hydra-core", "numpy")
SOURCE_ROOT = Path(__file__).resolve().parents[2]


def versions() -> dict[str, str | None]:
    """The versions of Python and of `PACKAGES`; None for one that is not installed as a distribution."""
    return {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def source(root: Path = SOURCE_ROOT) -> dict[str, Any] | None:
    """The commit of the code, and whether files differ from it (`dirty`); None outside a git checkout."""
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None

    def ask(*arguments: str) -> str | None:
        answer = subprocess.run([git, "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return answer.stdout.strip() if answer.returncode == 0 else None

    return {"commit": ask("rev-parse", "--verify", "HEAD"), "dirty": ask("status", "--porcelain") != ""}


def hardware() -> dict[str, Any]:
    """Processor, memory (bytes) and GPUs."""
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_cores": _usable_cores(),
        "cpu_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [
            {"name": gpu.name, "memory_bytes": gpu.total_memory}
            for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
        "cuda": torch.version.cuda,
    }


def _cpu_model() -> str:
    # platform.processor() names only the instruction set on Linux.
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    # A container or a batch system may allow fewer cores than the machine has.
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def reset_peak_memory() -> None:
    """Resets the GPU's peak of memory; that of the process cannot be reset."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, int | None]:
    """Peak bytes: the process since it began, earlier runs of a sweep included; the GPU during this run."""
    return {
        "process_bytes": _peak_resident_bytes(),
        "gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def _peak_resident_bytes() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # exists on Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kilobytes
