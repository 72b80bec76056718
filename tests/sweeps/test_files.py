"""Every sweep says what it claims and needs, composes for both of its models, and its first point runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from bs_exp.cli.conf_root import root_folder
from bs_exp.cli.config import build
from bs_exp.cli.multirun import sweep_claim
from bs_exp.corpora.windows import cut_windows
from bs_exp.demo.documentation import read_python_docs
from bs_exp.records.record import Status, read_record
from bs_exp.runs.experiment import Experiment

Cli = Callable[..., Any]
CONF, FOLDER = root_folder() / "conf", root_folder() / "sweeps"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
# All of them take minutes together.
_FAST = ("table_group_size", "ablate_dipsvd")
_SOME_FAST = [name if name in _FAST else pytest.param(name, marks=pytest.mark.slow) for name in FILES]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)


def _build(cfg: DictConfig) -> Experiment:
    return build(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]))


def _is_grid(cfg: DictConfig) -> bool:
    return str(cfg.hydra.sweeper._target_).endswith(".BasicSweeper")


def _points(cfg: DictConfig) -> list[list[str]]:
    params = [f"{key}={value}" for key, value in cfg.hydra.sweeper.params.items()]
    (points,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(params), None)
    return points


@pytest.mark.parametrize("name", FILES)
def test_says_what_it_claims_and_needs(name: str) -> None:
    text = FILES[name].read_text()
    header = text[: text.index("defaults:") if "defaults:" in text else text.index("hydra:")]
    assert "# Claim: " in header
    assert f"bs-exp sweeps={name}" in header or f"sweeps={name}" in header
    assert re.search(r"# Models?: ", header)
    assert re.search(r"\w+ (minutes?|h)\b", header), "how long it takes"
    assert max(map(len, text.splitlines())) <= 120


def test_readme_lists_every_sweep() -> None:
    listed = re.findall(r"^\| \[(\w+)\]\(\w+\.yaml\)", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(FILES)


@pytest.mark.parametrize("name", _SOME_FAST)
def test_builds_on_the_papers_model_and_on_the_demo(name: str) -> None:
    papers = composed(f"sweeps={name}")
    assert papers.hydra.mode.name == "MULTIRUN"
    assert papers.model._target_.endswith("DemoModel") or f"{papers.model.name}" in FILES[name].read_text()
    demo = composed(f"sweeps={name}", "model=demo")
    if not _is_grid(papers):
        _build(demo)
        return
    demo_points = _points(demo)
    _build(papers)
    last = composed(f"sweeps={name}", *demo_points[-1], "model=demo")
    _build(last)
    calibration = last.hydra.runtime.choices.calibration
    assert calibration == "python_docs" or f"calibration={calibration}" in demo_points[-1]


@pytest.mark.parametrize("name", _SOME_FAST)
def test_first_point_runs(cli: Cli, texts: Path, tmp_path: Path, name: str) -> None:
    cfg = composed(f"sweeps={name}", "model=tiny_random")
    if not _is_grid(cfg):
        pytest.skip("its sweeper has tests of its own")
    points = _points(cfg)
    first = [setting for setting in points[0] if setting.split("=")[0] not in ("model", "calibration")]
    parts = cfg.evaluation.parts or ["perplexity", "accuracy", "throughput"]
    evaluation = (
        ["evaluation=text", f"evaluation.files=[{texts}/B.txt]", "evaluation.sequence_length=64"]
        if parts == ["perplexity"]
        else ["evaluation=smoke", "evaluation.limit=4"]
    )
    done = cli(
        *(f"sweeps={name}", "model=tiny_random", *first, *evaluation, "calibration=text"),
        *(f"calibration.files=[{texts}/A.txt]", "calibration.num_sequences=8", "calibration.sequence_length=64"),
        *("tracking=none", "hydra.sweep.dir=sweep"),
    )
    assert done.status == 0, done.err
    (record,) = (read_record(path) for path in (tmp_path / "sweep").glob("*/record.json"))
    assert record.status == Status.COMPLETED
    assert record.objective is not None
    measured = {metric.split("/")[0] for metric in record.metrics["compressed"]}
    assert measured >= {{"perplexity": "ppl", "accuracy": "acc", "throughput": "throughput"}[part] for part in parts}


@pytest.mark.slow
def test_the_calibration_study_of_the_demo_has_five_texts_with_enough_windows() -> None:
    """Each of them is calibrated on by some points, and judged on by all: in parts that no point calibrates on."""
    grid = _points(composed("sweeps=study_calibration", "model=demo"))
    points = [_build(composed("sweeps=study_calibration", "model=demo", *point)) for point in grid]
    tokenizer = points[0].model.load().tokenizer
    calibrated: dict[tuple[str, ...], str] = {}
    for point in points:
        calibration: Any = point.recipe.calibration
        if calibration.corpus.packages not in calibrated:
            windows = calibration.windows(tokenizer)
            assert tuple(windows.ids.shape) == (48, 512)
            calibrated[calibration.corpus.packages] = windows.provenance["sha256"]
        judged = {corpus.packages: corpus.split for corpus in point.evaluators["perplexity"].corpora.values()}
        assert judged == dict.fromkeys(judged, "heldout") and calibration.corpus.split == "calibration"
    assert calibrated.keys() == judged.keys() and len(set(calibrated.values())) == 5 and len(points) == 20
    # What many systems' Python comes without must not be needed: tkinter is a third of that text.
    docs = read_python_docs("calibration").of(["python"])
    optional = {"tkinter", "turtledemo", "distutils"}
    always = [doc for name, doc in zip(docs.modules, docs.documents, strict=True) if name.split(".")[0] not in optional]
    assert len(cut_windows("\n\n".join(always), tokenizer, sequence_length=512).ids) >= 48


def test_unknown_sweep_lists_those_that_exist(cli: Cli) -> None:
    done = cli("sweeps=table_perplexty")
    assert done.status == 1
    assert "Did you mean table_perplexity?" in done.err
    assert all(name in done.err for name in FILES)


def test_a_named_model_brings_the_papers_data_and_any_other_word_wins() -> None:
    def data(*overrides: str) -> tuple[str, str]:
        choices = composed(*overrides).hydra.runtime.choices
        return choices.calibration, choices.evaluation

    assert data() == data("model=demo") == data("model=hub") == ("python_docs", "full")
    assert data("model=llama_7b") == ("wikitext2", "papers")
    assert data("model=llama_7b", "calibration=c4", "evaluation=text") == ("c4", "text")


def test_parts_choose_evaluators() -> None:
    assert list(_build(composed("evaluation=full", "evaluation.parts=[throughput,perplexity]")).evaluators) == [
        *("perplexity", "throughput")
    ]
    with pytest.raises(ValueError, match=r"evaluation\.parts: accurcy .* Did you mean accuracy\?"):
        _build(composed("evaluation=full", "evaluation.parts=[accurcy]"))


def test_claims_are_read_from_the_files() -> None:
    for name, start, end in (
        ("rank_search", "ranks per layer and type, group size", "for a number to report."),
        ("sweep_demo", "on the demo model, too", "beat both."),
    ):
        claim = sweep_claim(composed(f"sweeps={name}"))
        assert claim.startswith(start) and claim.endswith(end), claim
    assert sweep_claim(composed()) == ""
    assert all(sweep_claim(composed(f"sweeps={name}")) for name in FILES)
