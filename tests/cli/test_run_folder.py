"""A run into a folder that holds another one's result ends before anything is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bs_exp import save_model
from bs_exp.files import file_sizes
from bs_exp.models.tiny import tiny_random
from bs_exp.records.record import Status, read_record

Cli = Callable[..., Any]
Tiny = tuple[str, ...]


def test_a_completed_run_is_not_replaced_by_another(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    settings = (*tiny, "hydra.run.dir=OUT", "save_model=true")
    assert cli(*settings, "experiment=svd").status == 0
    before = {name: (tmp_path / "OUT" / name).read_bytes() for name in file_sizes(tmp_path / "OUT")}
    refused = cli(*settings, "experiment=svd", "retain_ratio=0.6")
    assert refused.status == 1
    told = " ".join(refused.err.split())
    assert "error: OUT holds a completed run of other settings, svd at 0.8 of " in told
    assert "(record.json and model/). Name another folder, hydra.run.dir=FOLDER, or replace it: force=true." in told
    assert {name: (tmp_path / "OUT" / name).read_bytes() for name in file_sizes(tmp_path / "OUT")} == before
    # The same run again, and another one by order.
    assert cli(*settings, "experiment=svd").status == 0
    assert cli(*settings, "experiment=svd", "retain_ratio=0.6", "force=true").status == 0
    assert read_record(tmp_path / "OUT").config["retain_ratio"] == 0.6


def test_a_failed_run_is_replaced(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    assert cli(*tiny, "hydra.run.dir=OUT", "retain_ratio=0.00001").status == 1
    assert read_record(tmp_path / "OUT").status == Status.FAILED
    assert cli(*tiny, "hydra.run.dir=OUT").status == 0


def test_the_model_that_is_compressed_is_not_replaced(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    dense = tiny_random()
    place = save_model(dense.module, dense.tokenizer, tmp_path / "OUT" / "model")
    before = {name: (place / name).read_bytes() for name in file_sizes(place)}
    refused = cli(*tiny[1:], f"model={place}", "hydra.run.dir=OUT", "save_model=true")
    assert refused.status == 1 and "holds the model that is compressed" in " ".join(refused.err.split())
    assert read_record(tmp_path / "OUT").plan is None  # before any work
    assert {name: (place / name).read_bytes() for name in file_sizes(place)} == before
