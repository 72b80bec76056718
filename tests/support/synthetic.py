"""Records of runs that never were, with the shapes and the orders of magnitude of real ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bs_exp.records.record import RunRecord, Status, write_record

METHODS = {"svd": 8.0, "svd_llm": 1.6, "basis_sharing": 1.4, "drank": 1.3, "best": 1.0}
MATRICES = {
    "q": (32, 32),
    "k": (32, 16),
    "v": (32, 16),
    "o": (32, 32),
    "gate": (32, 48),
    "up": (32, 48),
    "down": (48, 32),
}
DEVICE = "cpu (x86_64, 2 threads)"
_WHITENING = {"svd": "identity", "best": "two_sided"}
_TASKS = ("openbookqa", "arc_easy", "arc_challenge", "winogrande", "hellaswag", "piqa", "mathqa")


def record(
    method: str = "svd_llm",
    removed: float = 0.2,
    *,
    hub: str | None = None,
    group_size: int = 2,
    layers: int = 4,
    status: Status = Status.COMPLETED,
    corpora: Sequence[str] = ("wikitext2", "ptb"),
    ppl: float | None = None,
    changes: Mapping[str, Any] | None = None,
    **fields: Any,
) -> RunRecord:
    """A run; `changes` are settings by dotted key, `fields` those of the record itself."""
    kept = round(1 - removed, 6)
    config = _config(method, kept, hub, group_size)
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        node = config
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    done = status is Status.COMPLETED
    settings = {key: value for key, value in config.items() if key != "name"}
    error = {"type": "ConfigError", "message": "it went wrong", "stage": "decompose", "traceback": "Traceback ..."}
    made = RunRecord(
        name=method,
        run_id=f"{method}-{removed}",
        status=status,
        started="2026-01-02T03:04:05+00:00",
        finished=None if status is Status.RUNNING else "2026-01-02T03:05:05+00:00",
        command=("python", "-m", "bs_exp", "-m", f"experiment={method}", f"retain_ratio={kept}"),
        config=config,
        config_hash=hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        process=1,
        sweep={"id": "table", "job": 0, "settings": [f"experiment={method}", f"retain_ratio={kept}"]},
        error=error if status is Status.FAILED else None,
        plan=_plan(method, kept, group_size, layers) if done else None,
        metrics={
            "dense": _dense(corpora),
            **({"compressed": _compressed(method, removed, corpora, ppl)} if done else {}),
        },
        size=_size(kept) if done else {},
        timings={"load": 0.5, "perplexity (dense)": 2.0, "compress": 5.0, "calibrate": 3.0, "decompose": 1.5},
        memory={"process_bytes": 1 << 30, "gpu_bytes": None},
        cache={"hits": {}, "misses": {"decomposition": 28}, "damaged": {}},
        provenance={
            "model": {"source": "hub" if hub else "demo", "dtype": "float32", "name": hub or "demo"},
            "calibration": {"windows": 256, "sequence_length": 2048},
        },
        versions={"python": "3.12.0", "bs-exp": "0.1.0", "torch": "2.13.0"},
        source={"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        hardware={"cpu": "A processor", "cpu_cores": 2, "cpu_threads": 2, "memory_bytes": 1 << 34, "gpus": []},
        notes=("56 of 56 decompositions came from the cache",),
    )
    return replace(made, **fields)


def study(count: int, layers: int = 4) -> list[RunRecord]:
    """So many records of one sweep: methods by group size by ratio, one in twenty failed."""
    found: list[RunRecord] = []
    for i in range(count):
        method = list(METHODS)[i % len(METHODS)]
        removed = round(0.1 + 0.1 * (i // len(METHODS) % 8), 2)
        size = 2 + i // (8 * len(METHODS))
        status = Status.FAILED if i % 20 == 19 else Status.COMPLETED
        found.append(record(method, removed, group_size=size, layers=layers, status=status))
    return found


def write(records: Sequence[RunRecord], folder: Path) -> Path:
    """The records below a folder, one run folder each."""
    for i, found in enumerate(records):
        write_record(found, folder / f"{i:03d}")
    return folder


def _config(method: str, kept: float, hub: str | None, group_size: int) -> dict[str, Any]:
    shares = method in ("basis_sharing", "drank")
    sharing = {"_target_": "bs_exp.sharing.none.NoSharing"}
    if shares:
        sharing = {"_target_": "bs_exp.sharing.adjacent.AdjacentSharing", "group_size": group_size}
    allocation = {"drank": "effective_rank.EffectiveRank", "best": "water_filling.WaterFilling"}
    corpus = {"_target_": "bs_exp.corpora.hub_dataset.HubDataset", "path": "Salesforce/wikitext", "split": "train"}
    return {
        "name": method,
        "seed": 0 if shares else group_size,  # what stands for the third dimension where nothing is shared
        "retain_ratio": kept,
        "objective": None,
        "cache": {"dir": None},
        "model": {"_target_": "bs_exp.models.loading.HubModel", "name": hub, "revision": "main", "device": "auto"}
        if hub
        else {"_target_": "bs_exp.models.loading.DemoModel", "device": "auto"},
        "calibration": {"num_sequences": 256, "corpus": corpus, "set": {"num_sequences": 256, "corpus": corpus}},
        "sharing": sharing,
        "whitening": {"_target_": f"bs_exp.whitening.{_WHITENING.get(method, 'gram')}.Whitening", "ridge": 1e-6},
        "importance": {"_target_": "bs_exp.importance.none.NoImportance"},
        "allocation": {"_target_": f"bs_exp.allocation.{allocation.get(method, 'uniform.UniformAllocation')}"},
        "update": {"_target_": "bs_exp.update.none.NoUpdate"},
        "evaluation": {
            "sequence_length": 2048,
            "tail": "keep",
            "average": "windows",
            "special_tokens": True,
            "max_windows": None,
            "limit": None,
            "evaluators": {"perplexity": {"sequence_length": 2048}},
        },
    }


def _dense(corpora: Sequence[str]) -> dict[str, Any]:
    return {
        **{f"ppl/{name}": 5.68 + i for i, name in enumerate(corpora)},
        **{f"ppl_text_sha256/{name}": hashlib.sha256(name.encode()).hexdigest() for name in corpora},
        "ppl_tokens/wikitext2": 1000,
        "lm_eval/version": "0.4.13",
        **{f"acc/{task}": 0.5 for task in _TASKS},
        **{f"acc_stderr/{task}": 0.01 for task in _TASKS},
        "acc/mean": 0.5,
        **_speed(30000.0, 1500.0),
    }


def _compressed(method: str, removed: float, corpora: Sequence[str], ppl: float | None) -> dict[str, Any]:
    loss = METHODS.get(method, 2.0) * removed
    return {
        **{f"ppl/{name}": (5.68 + i) * (1 + 4 * loss) if ppl is None else ppl for i, name in enumerate(corpora)},
        "lm_eval/version": "0.4.13",
        **{f"acc/{task}": max(0.2, 0.5 - 0.1 * loss) for task in _TASKS},
        **{f"acc_stderr/{task}": 0.01 for task in _TASKS},
        "acc/mean": max(0.2, 0.5 - 0.1 * loss),
        **_speed(30000.0 * (1 + removed), 1500.0 * (0.8 + removed)),
        **speedup("throughput/prefill_tok_s", 1 + removed),
        **speedup("throughput/decode_tok_s", 0.8 + removed),
    }


def _speed(prefill: float, decode: float) -> dict[str, Any]:
    return {
        "throughput/prefill_tok_s": prefill,
        "throughput/prefill_tok_s_min": 0.99 * prefill,
        "throughput/prefill_tok_s_max": 1.01 * prefill,
        "throughput/decode_tok_s": decode,
        "throughput/decode_tok_s_min": 0.99 * decode,
        "throughput/decode_tok_s_max": 1.01 * decode,
        "throughput/device": DEVICE,
        "throughput/dtype": "float32",
        "throughput/batch_size": 8,
        "throughput/prompt_length": 256,
        "throughput/generated_length": 64,
    }


def speedup(rate: str, value: float) -> dict[str, Any]:
    """As a run records it that timed both models in turns, with an interval of 1.5 % to either side."""
    low, high = 0.985 * value, 1.015 * value
    words = "no difference measured" if low <= 1 <= high else "faster" if value > 1 else "slower"
    return {
        f"{rate}_speedup": value,
        f"{rate}_speedup_low": low,
        f"{rate}_speedup_high": high,
        f"{rate}_drift": 0.001,
        f"{rate}_difference": words,
    }


def _size(kept: float) -> dict[str, Any]:
    return {"retain_ratio": kept, "bytes": int(8e6 * (0.3 + 0.7 * kept)), "dense_bytes": 8_000_000}


def _plan(method: str, kept: float, group_size: int, layers: int) -> dict[str, Any]:
    shared = group_size if method in ("basis_sharing", "drank") else 1
    groups = []
    for i, (matrix, (d_in, d_out)) in enumerate(MATRICES.items()):
        for first in range(0, layers, shared):
            members = list(range(first, min(first + shared, layers)))
            share = min(1.0, kept + (0.03 * (i - 3) + 0.01 * first if method in ("drank", "best") else 0.0))
            width = d_in + len(members) * d_out
            rank = max(1, int(share * len(members) * d_in * d_out / width))
            groups.append(
                {"matrix": matrix, "layers": members, "d_in": d_in, "d_out": d_out, "rank": rank}
                | {"parameters": rank * width, "predicted_loss": 1.0, "loss_unit": "output_norm", "ridge": 1e-6}
            )
    return {"layout": "plain", "requested_ratio": kept, "retain_ratio": kept, "groups": groups}
