"""The contract suites, as the author of a plug-in meets them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUITE = """
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from bs_exp.testing import WhiteningContract
from bs_exp.types import Metric, Statistic


@dataclass(frozen=True)
class Mine:
    broken: bool
    needs: ClassVar = frozenset({Statistic.INPUT_MOMENTS})

    def metric(self, statistics):
        if statistics.moments is None:
            raise ValueError("Mine needs moments.")
        if self.broken:
            statistics.moments.peak.add_(1.0)
        return Metric(whitener=torch.diag(statistics.moments.peak + 1e-6))


class TestMine(WhiteningContract):
    @pytest.fixture(scope="class")
    @classmethod
    def whitening(cls):
        return Mine(broken=False)


class TestBroken(WhiteningContract):
    @pytest.fixture(scope="class")
    @classmethod
    def whitening(cls):
        return Mine(broken=True)


class TestForgotten(WhiteningContract):
    pass
"""


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_suite_passes_what_keeps_the_contract_and_says_what_does_not(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(SUITE, encoding="utf-8")
    run = _run(tmp_path, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "test_mine.py")
    told = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert not [line for line in told if "TestMine" in line], run.stdout
    assert any("TestBroken::test_same_in_same_out_and_the_input_is_untouched" in line for line in told), run.stdout
    assert "override the fixture `whitening`" in run.stdout
    assert "where False = <built-in method equal" in run.stdout  # assertions are rewritten: they show their values


def test_without_pytest_it_is_said_what_is_missing(tmp_path: Path) -> None:
    script = (
        "import importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'hypothesis' else found(name, package)\n"
        "import bs_exp.testing"
    )
    run = _run(tmp_path, "-c", script)
    assert run.returncode == 1
    assert "ImportError: bs_exp.testing holds test suites, and needs hypothesis, which is not installed" in run.stderr
