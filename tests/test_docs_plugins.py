"""docs/plugins.md as a reader follows it: an installed package, an empty directory, every file and every command."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bs_exp.records.record import RunRecord, Status, read_record

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
FILES = re.compile(r"^`([\w/.]+)`\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The page's commands on a model that takes seconds, and on two short texts.
_QUICK = "model=tiny_random calibration.num_sequences=8 calibration.sequence_length=64 evaluation.max_windows=4"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with nothing but what the page says, beside a package as a wheel installs it."""
    folder = tmp_path_factory.mktemp("reader")
    site, work = folder / "site-packages", folder / "work"
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "bs_exp", site / "bs_exp", ignore=without)
    for part in ("conf", "sweeps"):  # as in pyproject.toml, force-include
        shutil.copytree(ROOT / part, site / "bs_exp" / part, ignore=without)
    shutil.copy(ROOT / "bs_exp_autoload.py", site)
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name, module in (("bs-exp", "-m bs_exp"), ("python", "")):
        script = bin_folder / name
        script.write_text(f'#!/bin/sh\nPYTHONPATH="{site}:$PYTHONPATH" exec {sys.executable} {module} "$@"\n')
        script.chmod(0o755)
    work.mkdir()
    for path, text in FILES.findall(PAGE):
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        (work / path).write_text(text, encoding="utf-8")
    (work / "letters").mkdir()
    for name in ("a.txt", "b.txt"):
        (work / "letters" / name).write_text("Dear reader, this is a letter about letters. " * 200, encoding="utf-8")
    return work


@dataclass(frozen=True)
class Ended:
    """A command of the page, and what came of it."""

    command: str
    run: subprocess.CompletedProcess[str]


def _run(work: Path, command: str) -> Ended:
    path = f"{work.parent / 'bin'}:{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PATH": path}
    run = subprocess.run(
        ["/bin/sh", "-c", command], cwd=work, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, f"{command}\n{run.stdout}\n{run.stderr}"
    return Ended(command, run)


def _commands() -> Iterator[str]:
    for block in COMMANDS.findall(PAGE):
        yield from block.strip().splitlines()


def _records(work: Path) -> list[RunRecord]:
    return [read_record(path) for path in sorted((work / "outputs").rglob("record.json"))]


def test_the_page_has_files_and_commands() -> None:
    assert [path for path, _ in FILES.findall(PAGE)] == [
        "code/my_methods.py",
        "conf/whitening/power.yaml",
        "code/my_texts.py",
        "conf/corpus/letters.yaml",
        "conf/calibration/letters.yaml",
        "conf/sweeps/powers.yaml",
        "test_my_methods.py",
    ]
    assert len(list(_commands())) == 5


@pytest.mark.slow
def test_every_command_does_what_the_page_says(reader: Path) -> None:
    for command in _commands():
        more = _QUICK if "--config-dir" in command else ""
        if "sweeps=powers" in command:  # a sweep's folder is named by the settings that are given besides
            more += " hydra.sweep.dir=outputs/sweeps/powers"
        ended = _run(reader, f"{command} {more}")
        if "pytest" in command:
            assert re.search(r"\b[1-9]\d* passed", ended.run.stdout) and "failed" not in ended.run.stdout
    records = _records(reader)
    assert len(records) == 2 + 4 and all(record.status is Status.COMPLETED for record in records)
    powers = [record.config["whitening"]["power"] for record in records if "power" in record.config["whitening"]]
    assert sorted(powers) == [0.5, 0.5, 0.8, 1.0, 1.0]
    (letters,) = [record for record in records if "letters" in record.config["calibration"]["corpus"].values()]
    assert "ppl/letters" in letters.metrics["compressed"]
    assert letters.provenance["calibration"]["corpus"]["corpus"] == "letters"
    assert set(letters.provenance["code"]) == {"my_texts.Letters"}
    assert (reader / "outputs" / "sweeps").is_dir() and list((reader / "outputs" / "sweeps").rglob("index.html"))
