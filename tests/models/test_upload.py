"""Uploads to a stand-in for the hub, by the hub's real client: everything goes up, checked, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

import bs_exp
from bs_exp.errors import ConfigError, ModelError
from bs_exp.models.tiny import tiny_random
from bs_exp.models.upload import PLACE, files_to_upload, upload
from tests.support.hub_stub import hub

ROOT = Path(__file__).parents[2]
CODE = "modeling_basis_sharing.py"
TOKEN = "hf_of_nobody"


@pytest.fixture(scope="module")
def saved(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its card, and with files beside it that must not go up."""
    dense = tiny_random()
    made = bs_exp.compress(
        dense.module,
        dense.tokenizer,
        texts / "A.txt",
        overrides=["calibration.sequence_length=64"],
        quiet=True,
    )
    folder = made.save(tmp_path_factory.mktemp("upload") / "model")
    for name in (
        "optimizer.pt",
        "pytorch_model.bin",
        ".env",
        "tokenizer_secrets.json",
        "notes.md",
        "checkpoint-5/config.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not for others")
    (folder / "tokenizer.model").symlink_to("/etc/hostname")
    return folder


def checked(files: dict[str, bytes]) -> bool:
    """Whether every file of weights has the checksum that config.json names."""
    declared = json.loads(files["config.json"])["quantization_config"]["crc32"]
    weights = {name for name in files if name.endswith(".safetensors")}
    assert weights and weights == declared.keys() - {"config.json"}
    return all(f"{zlib.crc32(files[name]):08x}" == declared[name] for name in weights)


def test_every_way_to_the_hub_takes_the_checksums_along(saved: Path, tmp_path: Path) -> None:
    with hub() as server:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": server.address,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "home"),
        }
        script = ROOT / "tests" / "support" / "push_to_stub.py"
        done = subprocess.run(
            [sys.executable, str(script), str(saved), str(tmp_path / "native")],
            env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    whole = server.commits["org/command"]
    assert whole.keys() == set(files_to_upload(saved)[0]) >= {"README.md", "recipe.yaml", CODE, "tokenizer.json"}
    assert all(whole[name] == (saved / name).read_bytes() for name in whole.keys() - {"README.md"})
    card = whole["README.md"].decode()
    assert PLACE not in card and 'from_pretrained("org/command", trust_remote_code=True)' in card
    assert server.repos["org/command"]["visibility"] == "private"
    assert f"{server.address}/org/command/commit/" in done.stdout

    # Transformers' own ways; in the first one it would upload before the checksums are there.
    native, mixin = server.commits["org/native"], server.commits["org/mixin"]
    assert sum(name.endswith(".safetensors") for name in native) > 1
    assert all(
        {"config.json", "README.md", CODE} <= files.keys() and checked(files) for files in (native, mixin, whole)
    )
    assert load(mixin["model.safetensors"]).keys() == load(whole["model.safetensors"]).keys()

    refused = json.loads(done.stdout.splitlines()[-1])["refused"]
    assert refused.startswith("closed/model cannot be uploaded") and "hf auth login" in refused
    assert TOKEN not in refused + done.stdout + done.stderr
    assert not any(TOKEN.encode() in content for files in server.commits.values() for content in files.values())


def test_a_dry_run_lists_what_goes_up_and_what_stays(cli: Callable[..., Any], saved: Path) -> None:
    done = cli("push", str(saved), "org/name", "--dry-run")
    assert done.status == 0, done.err
    goes, stays = [], []
    for line in done.out.splitlines()[:-1]:
        (stays if line.split()[0] == "stays" else goes).append(line.split()[-1])
    assert (goes, stays) == files_to_upload(saved)
    assert set(stays) == {
        *("optimizer.pt", "pytorch_model.bin", ".env", "tokenizer_secrets.json", "notes.md"),
        *("checkpoint-5/config.json", "tokenizer.model"),
    }
    assert "files would go to org/name" in done.out


def test_what_cannot_go_up_is_said_before_anything_is_sent(
    cli: Callable[..., Any], saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="ORG/NAME"):
        upload(saved, "name")
    with pytest.raises(ConfigError, match="cannot name a model on the hub"):
        upload(saved, "org/name with blanks")
    done = cli("push", str(saved.parent), "org/name", "--dry-run")
    assert done.status == 1 and f"It holds the folder model: name {saved}" in done.err
    dense = tiny_random()
    bs_exp.save_model(dense.module, dense.tokenizer, tmp_path / "dense")
    with pytest.raises(ModelError, match="holds no compressed model"):
        upload(tmp_path / "dense", "org/name")
    bad = bs_exp.save_model(*bs_exp.load(saved), tmp_path / "damaged")
    content = bytearray((bad / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (bad / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged.*It is not uploaded"):
        upload(bad, "org/name")
