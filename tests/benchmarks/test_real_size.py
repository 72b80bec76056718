"""The benchmark of real sizes, at a small one: the figures of a run whose weights stay in their files."""

from __future__ import annotations

import re

import pytest
import torch

from bs_exp.benchmarks import walk
from bs_exp.benchmarks.real_size import main
from bs_exp.models.offload import computes


@pytest.mark.slow
def test_figures_of_a_run(capfd: pytest.CaptureFixture[str]) -> None:
    size = ["--layers", "2", "--width", "64", "--d-ff", "96", "--windows", "2", "--length", "32"]
    main([*size, "--offload", "none", "disk", "--", "experiment=svd_llm", "retain_ratio=0.5"])
    told = capfd.readouterr().out
    for offload in ("none", "disk"):
        assert re.search(rf"2 layers, 4 M parameters, offload={offload}\n  peak resident memory [\d.]+ GB, cache", told)
    here, in_files = map(float, re.findall(r"compressed: ppl/text ([\d.]+)", told))
    # Where the CPU cannot multiply in bf16, blocks that wait in files compute in fp32.
    exact = computes(torch.bfloat16, torch.device("cpu"))
    assert in_files == here if exact else in_files == pytest.approx(here, rel=1e-3)
    assert "decompose" in told


def test_sizes_that_make_no_model() -> None:
    with pytest.raises(SystemExit):
        main(["--width", "65"])


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_figures_of_a_walk(offload: str, capsys: pytest.CaptureFixture[str]) -> None:
    walk.main(
        ["--layers", "2", "--width", "64", "--d-ff", "96", "--windows", "2", "--length", "8", "--offload", offload]
    )
    told = capsys.readouterr().out
    for stage in ("load", "calibrate", "calibrate backward", "logits", "save"):
        assert re.search(rf"  {stage}: [\d.]+ s, peak resident memory [\d.]+ GB\n", told)
