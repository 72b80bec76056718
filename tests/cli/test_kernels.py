"""What libraries keep of shapes is bounded where a model is larger than memory, before torch reads how much."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from bs_exp.__main__ import _keep_few_kernels

NAMES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"offload": "disk"}, ("0", "1")),
        ({"offload": "cpu"}, ("0", "1")),
        ({"offload": "none"}, (None, None)),
        ({}, (None, None)),
    ],
)
def test_only_where_blocks_come_and_go(model: dict[str, str], expected: tuple[str | None, ...]) -> None:
    _keep_few_kernels(OmegaConf.create({"model": model}))
    assert tuple(os.environ.get(name) for name in NAMES) == expected


def test_what_the_user_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAMES[0], "7")
    _keep_few_kernels(OmegaConf.create({"model": {"offload": "disk"}}))
    assert tuple(os.environ.get(name) for name in NAMES) == ("7", "1")


def test_the_command_has_not_imported_torch_by_then() -> None:
    code = "import sys, bs_exp.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
