"""The entry point knows which vLLM it works with, before it imports anything of it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bs_exp.models import modeling_basis_sharing
from bs_exp.serving import vllm_plugin


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.9.1", False), ("0.31.2", False), ("0.32.0", True), ("0.33.1rc1+cpu", True), ("1.0", True), ("dev", True)],
)
def test_supported_versions(version: str, supported: bool) -> None:
    assert vllm_plugin.is_supported(version) is supported


def test_the_refusal_names_version_and_range() -> None:
    assert "vllm>=0.32; this is vllm 0.9.1" in vllm_plugin.too_old("0.9.1")


def test_the_entry_point_is_declared_and_registers_the_method_of_saved_models() -> None:
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    assert declared["vllm.general_plugins"] == {"bs_exp": f"{vllm_plugin.__name__}:{vllm_plugin.register.__name__}"}
    assert vllm_plugin.METHOD == modeling_basis_sharing.METHOD


def test_looking_the_entry_point_up_imports_neither_torch_nor_vllm() -> None:
    """vLLM looks it up in all its processes, whatever they serve."""
    code = (
        "import sys; from bs_exp.serving.vllm_plugin import register; "
        "sys.exit(', '.join({'torch', 'transformers', 'vllm', 'hydra', 'lm_eval'} & sys.modules.keys()) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
