"""README, docs and CITATION.cff: links lead somewhere, commands compose, and what README says of a first run is so."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

import bs_exp
import bs_exp.__main__  # what the configuration refers to, and the sweepers
from bs_exp.cli.arguments import for_hydra
from bs_exp.cli.commands import COMMANDS
from bs_exp.cli.conf_root import root_folder
from bs_exp.models.tiny import tiny_random
from bs_exp.records.record import Status, read_record

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "sweeps" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FLAGS = ("-m", "--multirun", "--cfg", "--help", "--version", "--shell-completion")


def blocks(page: str, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page) if found == language]


def commands(page: str) -> list[list[str]]:
    """The words of every `bs-exp` command that stands in a block for a shell."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line.partition(" | ")[0], comments=True) for line in lines]
    return [
        words[1:] if words[0] == "bs-exp" else words[3:]
        for words in found
        if words and (words[0] == "bs-exp" or words[:3] == ["python", "-m", "bs_exp"])
    ]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(BLOCK, "", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_read_in_a_few_minutes() -> None:
    lines = README.splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(re.sub(BLOCK, "", page.read_text(encoding="utf-8"))):
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_compose(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every setting that a page names exists, where the reader has the files that it names."""
    monkeypatch.chdir(tmp_path)
    for name in ("DIR", "FOLDER"):
        Path(name).mkdir()
    for name in ("FILE", "TEXT.txt"):
        Path(name).touch()
    with initialize_config_dir(str(root_folder() / "conf"), version_base="1.3"):
        for words in commands(page.read_text(encoding="utf-8")):
            if words[:1] and words[0] in COMMANDS:
                continue
            settings = for_hydra(
                [word for word in words if word not in (*FLAGS, "job") and not word.startswith("install=")]
            )
            if not settings:
                continue
            named = ["sweeps=table_group_size" if setting == "sweeps=NAME" else setting for setting in settings]
            parsed = OverridesParser.create().parse_overrides(named)
            if "hydra/sweeper=optuna" in named:  # which takes spaces, of which no point can be named before the search
                named = [text for text, found in zip(named, parsed, strict=True) if not found.is_sweep_override()]
            (points,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(named), None)
            for point in (points[0], points[-1]):
                compose("config", point, return_hydra_config=True)


def test_the_demo_of_readme_is_the_demo() -> None:
    """Its rows are the dense model and the methods of sweeps/demo.yaml, in their order."""
    sweep = yaml.safe_load((ROOT / "sweeps" / "demo.yaml").read_text(encoding="utf-8"))
    table = next(text for text in blocks(README, "") if "kept" in text)
    methods = sweep["hydra"]["sweeper"]["params"]["experiment"].split(",")
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["dense", *methods]


def test_what_readme_says_of_an_own_model(
    cli: Callable[..., Any], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command and the two pieces of Python as they stand, for a folder DIR and a text."""
    dense = tiny_random()
    dense.module.save_pretrained(tmp_path / "DIR")
    dense.tokenizer.save_pretrained(tmp_path / "DIR")
    (tmp_path / "TEXT.txt").write_text(
        "".join((texts / name).read_text("utf-8") for name in ("A.txt", "B.txt")), "utf-8"
    )
    (own,) = (words for words in commands(README) if "model=DIR" in words)
    # Windows that fit the tiny model's context; no files of a tracker.
    short = ["calibration.sequence_length=64", "evaluation.sequence_length=64", "tracking=none"]
    done = cli(*own, *short)
    assert done.status == 0, done.err
    assert read_record(tmp_path / "OUT").status is Status.COMPLETED
    names: dict[str, Any] = {}
    for example in blocks(README, "python"):
        exec(compile(example, "README.md", "exec"), names)
    monkeypatch.undo()
    assert type(bs_exp.to_dense(names["model"])).__name__ == "LlamaForCausalLM"
    assert names["result"].plan.requested_ratio == 0.8
    assert (tmp_path / "OUT" / "model2" / "model.safetensors").exists()


def test_citation() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited.keys() >= {"cff-version", "message", "title", "authors"}
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software" and cited["authors"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cited["version"] == project["version"]
    for reference in cited["references"]:
        assert reference.keys() >= {"type", "title", "authors"}
        assert all(author.keys() >= {"family-names", "given-names"} for author in reference["authors"])
        assert reference["url"] in README
    assert len(cited["references"]) == 2
