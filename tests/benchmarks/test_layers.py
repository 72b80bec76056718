"""The benchmark compares what it says: same budget, same rank, the multiply-adds of each; times are not asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bs_exp.benchmarks.layers import main, variants


def test_variants_hold_what_they_claim() -> None:
    dense, plain, same_budget, same_rank = variants(64, 48, 0.7, dtype=torch.float32, device=torch.device("cpu"))
    x = torch.randn(3, 64)
    for variant in (dense, plain, same_budget, same_rank):
        assert variant.module(x).shape == (3, 48)
        weights = sum(p.numel() for p in variant.module.parameters())
        assert variant.multiply_adds == weights <= variant.parameters
    assert plain.parameters <= 0.7 * dense.parameters
    assert same_budget.parameters <= 0.7 * dense.parameters
    assert plain.rank == same_rank.rank == int(0.7 * 64 * 48 / (64 + 48))
    assert plain.rank is not None and same_budget.rank is not None
    assert same_budget.rank > plain.rank
    assert plain.multiply_adds - same_rank.multiply_adds == plain.rank**2


def test_ranks_in_multiples() -> None:
    _, plain, same_budget, same_rank = variants(
        64, 48, 0.7, dtype=torch.float32, device=torch.device("cpu"), multiple=8
    )
    assert (plain.rank, same_rank.rank) == (16, 16)
    assert same_budget.rank is not None and same_budget.rank % 8 == 0 and same_budget.rank > 16


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_command_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "layers.json"
    arguments = "--d-in 32 --d-out 32 --batch 1 4 --rounds 2 --seconds 0.01 --device cpu"
    main([*arguments.split(), "--json", str(file)])
    record = json.loads(file.read_text())
    assert [(m["case"], m["variant"]) for m in record["measurements"][:2]] == [("1", "dense"), ("1", "plain")]
    assert len(record["measurements"]) == 8
    assert all(0 < m["fastest"] <= m["median"] <= m["slowest"] for m in record["measurements"])
    assert "pivoted, same rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        "--ratio 1.5",
        "--batch 0",
        "--multiple 0",
        "--ratio 0.001 --d-in 8 --d-out 8",
        "--multiple 64 --d-in 64",
        "--seconds nan",
        "--device meta",
        "--json /",
        "--json /nowhere/a.json",
    ],
)
def test_bad_arguments(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments.split())
    assert "error:" in capsys.readouterr().err
