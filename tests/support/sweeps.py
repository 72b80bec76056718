"""A small sweep by the command line, and what of it must not depend on who was killed, or which disk was full."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from bs_exp.errors import RecordError
from bs_exp.records.record import RunRecord, Status, read_record

POINTS = 4
# Depend on the machine, on what else it does, or on which process had loaded the model.
_VARYING = ("throughput/", "cost/")


def sweep_command(tiny: tuple[str, ...], *more: str, ratios: str = "0.8,0.5") -> list[str]:
    """Two points with saved models per ratio, in the folders `sweep` and `cache`."""
    return [
        "-m",
        *tiny,
        "model.layers=2",
        "experiment=svd_llm,basis_sharing",
        f"retain_ratio={ratios}",
        "save_model=true",
        "cache.dir=cache",
        "hydra.sweep.dir=sweep",
        *more,
    ]


def search_command(tiny: tuple[str, ...], *more: str) -> list[str]:
    """A grid search of six points, whose folder is `sweep` too."""
    return [
        "-m",
        "hydra/sweeper=optuna",
        "hydra/sweeper/sampler=grid",
        *tiny,
        "model.layers=2",
        "experiment=svd_llm",
        "retain_ratio=choice(0.9,0.8,0.7,0.6,0.5,0.4)",
        "hydra.sweeper.n_trials=6",
        "cache.dir=cache",
        "hydra.sweep.dir=sweep",
        *more,
    ]


def records(sweep: Path) -> dict[str, RunRecord | str]:
    """The record of every point, by folder; for one that cannot be read, what is wrong with it."""
    found: dict[str, RunRecord | str] = {}
    for path in sorted(sweep.glob("*/record.json")):
        try:
            found[path.parent.name] = read_record(path)
        except RecordError as error:
            found[path.parent.name] = str(error)
    return found


def results(record: RunRecord) -> dict[str, Any]:
    """What a point found: plan, metrics, sizes, and what it says of model and calibration."""
    data = record.to_dict()
    metrics = {
        kind: {name: value for name, value in values.items() if not name.startswith(_VARYING)}
        for kind, values in data["metrics"].items()
    }
    provenance = {key: value for key, value in data["provenance"].items() if key != "dense_metrics"}
    provenance["model"] = {k: v for k, v in provenance.get("model", {}).items() if k != "loaded_by"}
    kept = {key: data[key] for key in ("config_hash", "plan", "size", "objective", "model_folder")}
    return {**kept, "metrics": metrics, "provenance": provenance}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def signature(sweep: Path) -> dict[str, Any]:
    """What every completed point found, and the bytes of its model."""
    return {
        name: {"results": results(record), "model": digests(sweep / name / "model")}
        for name, record in records(sweep).items()
        if isinstance(record, RunRecord) and record.status is Status.COMPLETED
    }


def differences(found: dict[str, Any], expected: dict[str, Any], *, whole: bool = True) -> list[str]:
    """Points that are missing (if all should be there), too many, or not bit for bit as expected."""
    lost = [f"point {name} is missing" for name in expected.keys() - found.keys() if whole]
    lost += [f"point {name} belongs to nothing" for name in found.keys() - expected.keys()]
    for name in found.keys() & expected.keys():
        for part, value in expected[name].items():
            if found[name][part] != value:
                lost.append(f"{part} of point {name} differ: {_first(found[name][part], value)}")
    return lost


def _first(found: Any, expected: Any) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in {**expected, **found}:
            if found.get(key) != expected.get(key):
                return f"{key}: {_first(found.get(key), expected.get(key))}"
    return f"{json.dumps(found)[:100]}, not {json.dumps(expected)[:100]}"


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders that killed processes left."""
    return [path.name for path in folder.rglob(".*") if path.name.endswith(".tmp") or path.name.startswith(".model-")]
