"""Whether a run fits: what it needs beside what is free, and the dials that lower it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from bs_exp import processes
from bs_exp.errors import EstimateError
from bs_exp.estimate.estimate import SAVED, Estimate, Place

# A need above this share of what is free is told.
_NEAR = 0.8
# An estimate is that: only a need so many times what there is, is refused.
_IMPOSSIBLE = 1.25
_MEMORY_DIALS = (
    "model.offload=disk",
    "calibration.activations=disk",
    "calibration.batch_size=1",
    "model.dtype=bfloat16",
    "a shorter calibration.sequence_length",
)
_DISK_DIALS = (
    "schedule=single",
    "cache.dtype=float32",
    "cache.keep_rounds=false",
    "cache.dir=DIR on a larger disk",
    "fewer calibration.num_sequences (hidden states)",
)
_DEVICE_DIALS = ("model.offload=disk or cpu", "calibration.batch_size=1", "model.device=cpu")


@dataclass(frozen=True)
class Room:
    """What there is of something, what of it a run needs, and what lowers that. Bytes."""

    what: str
    needed: int
    free: int
    dials: tuple[str, ...]

    @property
    def told(self) -> str:
        return (
            f"about {self.needed / 1e9:.3g} GB of {self.what} are needed, {self.free / 1e9:.3g} GB are free. What "
            f"lowers the need: {'; '.join(self.dials)}."
        )


def rooms(found: Estimate, place: Place, folder: Path | None, run_folder: Path) -> tuple[Room, ...]:
    """What a run needs of memory, disk and device, beside what is free now."""
    sharing = processes.on_this_machine()
    free = psutil.virtual_memory().available + sharing * psutil.Process().memory_info().rss
    in_effect = {"model.offload=disk"} if place.offload == "disk" else set()
    if len(found.rounds.ratios) == 1:
        in_effect |= {"schedule=single", "cache.keep_rounds=false"}
    made = [Room("host memory", sharing * found.host[1], free, _without(in_effect, _MEMORY_DIALS))]
    if folder is not None:
        dials = _without(in_effect, _DISK_DIALS)
        made.append(Room(f"disk under {folder}", found.cache_bytes, _free(folder) + _held(folder), dials))
    if saved := found.disk.get(SAVED):
        dials = ("save_model=false", "hydra.run.dir=DIR on a larger disk")
        made.append(Room(f"disk under {run_folder}", saved, _free(run_folder), dials))
    if place.device.type == "cuda":
        free = torch.cuda.mem_get_info(place.device)[0] + torch.cuda.memory_reserved(place.device)
        made.append(Room(f"memory on {place.device}", found.device[1], free, _DEVICE_DIALS))
    return tuple(made)


def warnings(found: Estimate, there: tuple[Room, ...], max_gb: float | None) -> list[str]:
    """What is scarce."""
    told = [room.told for room in there if room.needed > _NEAR * room.free]
    if max_gb is not None and found.cache_bytes > max_gb * 2**30:
        told.append(
            f"the run itself puts about {found.cache_bytes / 2**30:.3g} GiB into the cache, above "
            f"cache.max_gb={max_gb:g}: what it uses stays until it ends. Raise it, or lower the need with "
            "schedule=single or cache.dtype=float32."
        )
    return told


def too_large(there: tuple[Room, ...]) -> EstimateError | None:
    """The error of a run whose need is clearly above what there is; None for one that may fit."""
    short = [room.told for room in there if room.needed > _IMPOSSIBLE * room.free]
    if not short:
        return None
    return EstimateError(
        f"This run does not fit: {' '.join(short)} ignore_estimate=true begins all the same; dry_run=true prints the "
        "whole estimate."
    )


def _without(in_effect: set[str], dials: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dial for dial in dials if dial not in in_effect)


def _free(folder: Path) -> int:
    """Free bytes of the disk on which a folder is, or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _held(folder: Path) -> int:
    """Bytes that the folder holds already: what a run finds there it does not write again."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
