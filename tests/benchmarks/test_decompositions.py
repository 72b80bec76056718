"""The table of decompositions: both ways agree, and operations are counted by hand."""

from __future__ import annotations

import pytest

from bs_exp.benchmarks.decompositions import main, measure, operations


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize(("d_in", "d_out"), [(12, 12), (12, 20), (20, 12)])
def test_both_ways_give_one_loss(d_in: int, d_out: int, two_sided: bool) -> None:
    found = measure(d_in, d_out, two_sided=two_sided, rounds=1)
    assert found.difference < 1e-8 and found.both_roots > 0.0 and found.smaller_side > 0.0


def test_operations_of_a_wide_group() -> None:
    """10 x 20: thin products take 4,000 each, (S W) G 8,000, roots 4/3 and eigenvectors 14/3 of 10^3."""
    assert operations(10, 20, two_sided=False) == pytest.approx(3 * 4000 + 6 * 1000)
    assert operations(10, 20, two_sided=True) == pytest.approx(4 * 4000 + 8000 + 6 * 1000)
    assert operations(20, 10, two_sided=False) == pytest.approx(3 * 4000 + 8000 + 14 / 3 * 1000)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--width", "16", "--d-ff", "24", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[-1].split()[:3] == ["24", "16", "two-sided"]
