"""Measured groupings through the command line: chosen after calibration, refused before it, the same from the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from bs_exp.records.record import read_record

Cli = Callable[..., Any]
NATS = ("whitening=two_sided", "allocation=water_filling")


@pytest.mark.parametrize(
    "settings",
    [
        ("sharing=clustered", "sharing.clusters=2", "sharing.max_size=null"),
        ("sharing=criterion", "sharing.norm=output", "whitening=identity"),
        ("sharing=optimal", "sharing.g_max=3", *NATS),
        ("sharing=heads", "sharing.heads_per_block=1", "layout=pivoted", *NATS),
        ("sharing=residual", "sharing.residual_rank=2", "layout=pivoted"),
        ("sharing=explicit", "sharing.layers={q: [[0, 2]], up: [[0, 1, 2]]}"),
    ],
    ids=lambda settings: settings[0],
)
def test_run_saves_a_model_within_the_budget(cli: Cli, tiny: tuple[str, ...], tmp_path: Path, settings: Any) -> None:
    done = cli(*tiny, *settings, "retain_ratio=0.7", "save_model=true", "hydra.run.dir=out")
    assert done.status == 0, done.err
    record = read_record(tmp_path / "out")
    assert 0.5 < record.size["retain_ratio"] <= 0.7
    # Every matrix once, in blocks or whole.
    members = [(g["matrix"], layer) for g in record.plan["groups"] for layer in g["layers"]]  # type: ignore[index]
    assert len(members) == len(set(members)) and {layer for _, layer in members} == {0, 1, 2}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")


def test_groups_are_the_same_from_the_cache(cli: Cli, tiny: tuple[str, ...], tmp_path: Path) -> None:
    settings = ("sharing=optimal", "sharing.g_max=2", *NATS)
    first, second = (
        read_record(tmp_path / f"out{i}") for i in range(2) if cli(*tiny, *settings, f"hydra.run.dir=out{i}")
    )
    assert first.plan == second.plan
    assert second.cache["misses"] == {} and second.cache["hits"]["spectrum"] == 3 * 7 + 2 * 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("sharing=optimal",), "OptimalSharing adds up losses of different matrix types"),
        (("sharing=clustered", "sharing.clusters=4"), "sharing.clusters must be at most 3"),
        (("sharing=heads", "model.family=gpt2"), "sharing=heads cannot cut qkv of this gpt2 model"),
        (("sharing=residual", "sharing.residual_rank=30"), "sharing.residual_rank must be at most"),
        (("sharing=explicit", "sharing.layers={q: [[0, 3]]}"), "sharing.layers.q names layer 3"),
        (("sharing.group_size={q: 9}",), "sharing.group_size.q must be between 1 and 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_what_cannot_be_is_refused_before_the_dense_evaluation(
    cli: Cli, tiny: tuple[str, ...], tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    done = cli(*tiny, *settings, "hydra.run.dir=out")
    assert done.status == 1 and message in done.err and "Traceback" not in done.err
    assert not read_record(tmp_path / "out").metrics
