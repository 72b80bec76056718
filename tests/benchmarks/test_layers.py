"""The benchmark compares what it says: same budget, same rank, the multiply-adds of each; times are not asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bs_exp.benchmarks.comparison import compared
from bs_exp.benchmarks.layers import main, variants
from bs_exp.evaluation.in_turns import in_turn

CPU = torch.device("cpu")


@pytest.mark.parametrize("group", [1, 2, 3])
def test_variants_hold_what_they_claim(group: int) -> None:
    dense, plain, same_budget, same_rank = variants(64, 48, 0.7, dtype=torch.float32, device=CPU, group=group)
    x = torch.randn(3, 64)
    for variant in (dense, plain, same_budget, same_rank):
        layers = next(iter(variant.module.children()))
        assert [y.shape for y in variant.module(x)] == [(3, 48)] * group == [layer(x).shape for layer in layers]
        assert variant.multiply_adds == sum(p.numel() for layer in layers for p in layer.parameters())
        assert sum(p.numel() for p in variant.module.parameters()) <= variant.parameters
    assert plain.parameters <= 0.7 * dense.parameters
    assert same_budget.parameters <= 0.7 * dense.parameters
    assert plain.rank == same_rank.rank == int(0.7 * 64 * 48 * group / (64 + 48 * group))
    assert plain.rank is not None and same_budget.rank is not None
    assert same_budget.rank > plain.rank
    assert plain.multiply_adds - same_rank.multiply_adds == group * plain.rank**2


@pytest.mark.parametrize("group", [2, 4])
def test_pivots_of_a_shared_basis_save_multiply_adds_at_the_same_budget(group: int) -> None:
    """Every layer is spared the identity, which outweighs the higher rank."""
    _, plain, same_budget, _ = variants(512, 512, 0.8, dtype=torch.float32, device=CPU, group=group)
    assert same_budget.multiply_adds < 0.9 * plain.multiply_adds


def test_every_round_begins_with_another() -> None:
    assert list(in_turn(3, 4)) == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]


def test_comparison_is_round_by_round() -> None:
    """A machine that is slow for a while is slow for all; the interval needs six rounds."""
    found = variants(8, 8, 0.7, dtype=torch.float32, device=CPU)
    speed = [1.0, 5.0, 2.0, 9.0, 3.0, 4.0, 7.0]
    times = [[2 * s for s in speed], speed, [0.5 * s for s in speed], [s / (1 + i / 10) for i, s in enumerate(speed)]]
    dense, plain, same_budget, same_rank = compared("1", found, times)
    assert dense.of_plain == 0.5 and plain.of_plain == 1.0 and same_budget.of_plain == 2.0
    assert same_budget.of_plain_interval == (2.0, 2.0)
    assert same_rank.of_plain == pytest.approx(1.3)
    assert same_rank.of_plain_interval is not None and same_rank.of_plain_interval == pytest.approx((1.0, 1.6))
    assert all(m.of_plain_interval is None for m in compared("1", found, [t[:5] for t in times]))


def test_ranks_in_multiples() -> None:
    _, plain, same_budget, same_rank = variants(64, 48, 0.7, dtype=torch.float32, device=CPU, multiple=8)
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
        "--group 0",
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
