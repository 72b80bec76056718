"""Help, version, the cache's table and export: what is not a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import bs_exp
from bs_exp.cli.commands import COMMANDS
from bs_exp.cli.conf_root import root_folder

Cli = Callable[..., Any]
Tiny = tuple[str, ...]
CONF = root_folder() / "conf"
ROOT = Path(__file__).parents[2]


def test_help_lists_commands_groups_and_options_on_two_screens(cli: Cli) -> None:
    done = cli("--help")
    assert done.status == 0 and done.err == ""
    lines = done.out.splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120
    assert all(f"  bs-exp {name} " in done.out for name in (*COMMANDS, "-m"))
    assert "sweeps=" in done.out and " _" not in done.out and "@package" not in done.out
    for path in CONF.glob("*/[!_]*.yaml"):
        if path.parent.name != "corpus":
            assert any(path.stem in line.replace("*", " ").replace(",", " ").split() for line in lines), path
    assert any(line.startswith("sharing     all         Every matrix type shares.") for line in lines)
    assert "paper*" in done.out and "retain_ratio [0.8]" in done.out


def test_help_of_a_group_and_of_an_option(cli: Cli) -> None:
    group = cli("--help", "sharing").out
    assert "sharing=none\n    No sharing: every matrix has its own basis (SVD-LLM)." in group and "..." not in group
    assert (
        "best_without/steps" in cli("experiment", "--help").out and "sweeps=sweep_demo" in cli("--help", "sweeps").out
    )
    assert cli("--help", "sharing=paper").out.strip() == (CONF / "sharing" / "paper.yaml").read_text().strip()
    wrong = cli("--help", "sharin")
    assert wrong.status == 1 and "Did you mean sharing?" in wrong.err


def test_version_is_ours_and_imports_nothing(tmp_path: Path) -> None:
    program = "import sys; from bs_exp.__main__ import main\nmain(); print([n for n in sys.modules if n == 'torch'])"
    done = subprocess.run(
        [sys.executable, "-c", program, "--version"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, imported = done.stdout.splitlines()
    assert first.startswith("bs-exp ") and f"torch {torch.__version__}" in first and "transformers 5" in first
    assert imported == "[]"
    assert not list(tmp_path.iterdir())


def test_the_cache_is_listed_and_a_model_exported(cli: Cli, tiny: Tiny) -> None:
    empty = cli("cache")
    assert empty.status == 1 and "there is no cache in" in empty.err
    done = cli(*tiny, "save_model=true", "hydra.run.dir=out")
    assert done.status == 0, done.err
    listed = cli("cache")
    assert listed.status == 0, listed.err
    rows = [line.split() for line in listed.out.splitlines()]
    found = {row[0]: row for row in rows if len(row) > 5}
    count = len(list(Path("outputs/cache/decomposition").iterdir()))
    assert found["decomposition"][1:3] == ["llama-3-0", str(count)] and "outputs/cache: " in listed.out

    assert "bs-exp export out/model --to dense" in cli("export", "out", "--to", "dense").err
    exported = cli("export", "out/model", "--to", "dense")
    assert exported.status == 0 and exported.out.strip().endswith("out/model-dense"), exported.err
    # Another process's view: nothing of ours is needed to read it.
    dense = AutoModelForCausalLM.from_pretrained("out/model-dense")
    small = AutoModelForCausalLM.from_pretrained("out/model")
    assert not any(isinstance(module, bs_exp.SharedLinear) for module in dense.modules())
    ids = torch.arange(10)[None]
    torch.testing.assert_close(dense(ids).logits, small(ids).logits, rtol=1e-4, atol=1e-5)
    again = cli("export", "out/model", "--to", "dense")
    assert again.status == 1 and "exists already. Name another folder with --out." in again.err


def test_the_cache_is_pruned_and_made_again(cli: Cli, tiny: Tiny) -> None:
    assert "there is no cache in" in cli("cache", "prune", "--max-gb", "1").err
    assert cli(*tiny, "hydra.run.dir=one").status == 0
    kept = cli("cache", "prune", "--max-gb", "1")
    assert kept.status == 0 and ": 0 B freed, " in kept.out
    pruned = cli("cache", "prune", "--max-gb", "0", "outputs/cache")
    assert pruned.status == 0 and "freed, 0 B left." in pruned.out
    assert not list(Path("outputs/cache").glob("*/*.safetensors"))
    assert cli(*tiny, "hydra.run.dir=two").status == 0
    one, two = (json.loads(Path(folder, "record.json").read_text()) for folder in ("one", "two"))
    assert one["plan"] == two["plan"] and two["cache"]["hits"] == {}


@pytest.mark.parametrize("arguments", [
    ("export", "out/model"), ("export", "x", "--to", "gguf"), ("cache", "a", "b"),
    ("cache", "prune"), ("cache", "--max-gb", "1"), ("cache", "prune", "--max-gb", "-1"),
    ("cache", "prune", "--max-gb", "x"),
])  # fmt: skip
def test_wrong_arguments_of_commands_end_with_their_usage(cli: Cli, arguments: tuple[str, ...]) -> None:
    done = cli(*arguments)
    assert done.status == 2 and "usage: bs-exp" in done.err


def test_help_on_an_option_that_does_not_exist_is_refused(cli: Cli) -> None:
    refused = cli("--help", "experiment=bset")
    assert refused.status == 1 and "error: experiment=bset does not exist. Did you mean best?" in refused.err
    inside = cli("--help", "experiment=best_without")
    assert inside.status == 0 and "experiment=best_without/steps" in inside.out and "experiment=svd" not in inside.out


def test_a_sweep_that_cannot_be_written_says_one_thing(cli: Cli, tiny: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        refused = cli("-m", *tiny, "retain_ratio=0.8,0.6", "hydra.sweep.dir=file/sweep")
    assert refused.status == 1 and "error: Cannot write file/sweep/sweep.json" in refused.err
    assert not [str(w.message) for w in warned if "Callback" in str(w.message)]
