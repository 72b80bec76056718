"""`data=` and `model=`: one word for calibration and evaluation, and paths where options stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import bs_exp
from bs_exp.cli.arguments import for_hydra
from bs_exp.cli.conf_root import root_folder
from bs_exp.cli.points import hash_of
from bs_exp.models.tiny import tiny_random
from bs_exp.records.record import read_record

Compose = Callable[..., DictConfig]
CONF = root_folder() / "conf"
DATA = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
SHORT = ("calibration.sequence_length=64", "evaluation.sequence_length=64")


@pytest.fixture
def composed() -> Iterator[Compose]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *settings, **options: compose("config", for_hydra(settings), **options)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """40,000 characters in paragraphs."""
    path = tmp_path / "mine.txt"
    path.write_text("\n\n".join(f"{n}: " + "one word follows another in it " * 6 for n in range(200)), encoding="utf-8")
    return path


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A model of one's own, in a folder whose name has a blank and signs of Hydra's grammar."""
    folder = tmp_path / "my model (1), a=b"
    made = tiny_random()
    made.module.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("option", DATA)
def test_calibration_and_evaluation_are_different_parts(composed: Compose, option: str) -> None:
    cfg = composed(f"data={option}", *(["calibration.files=[a.txt]"] if option == "text" else []))
    calibrated = OmegaConf.to_container(cfg.calibration.corpus, resolve=True)
    [evaluated] = OmegaConf.to_container(cfg.evaluation.corpora, resolve=True).values()  # type: ignore[union-attr]
    assert isinstance(calibrated, dict) and isinstance(evaluated, dict)
    assert calibrated["_target_"] == evaluated["_target_"] and calibrated.get("path") == evaluated.get("path")
    part = "part" if option == "text" else "split"
    assert calibrated[part] != evaluated[part]


def test_a_path_is_an_option(composed: Compose, text: Path, dense: Path) -> None:
    cfg = composed(f"data={text}", f"model={dense}")
    assert (cfg.model.path, list(cfg.calibration.files)) == (str(dense), [str(text)])
    assert cfg.evaluation.corpora.text.files == cfg.calibration.corpus.files == cfg.calibration.files
    same = composed("data=text", f"calibration.files=['{text}']", "model=local", f"model.path='{dense}'")
    assert same == cfg and hash_of(same) == hash_of(cfg) != hash_of(composed(f"model={dense}"))
    assert composed("model=org/some-model_1.5B").model.name == "org/some-model_1.5B"
    # What is said besides wins, as over any option.
    assert composed(f"data={text}", "calibration=wikitext2").calibration.corpus.split == "train"
    assert "python_docs" in composed("data=wikitext2", "evaluation=full").evaluation.corpora
    assert composed("data=wikitext2", "sweeps=rank_search").evaluation.corpora.keys() == {"wikitext2"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model=gtp2", "model=gtp2 does not exist. Did you mean gpt2?"),
        ("model=./absent", "model=./absent: there is no such folder"),
        ("model=x.gguf", "model=x.gguf: GGUF files hold weights that are quantised already"),
        ("model=mine.txt", "model=mine.txt is a file; name the folder that it lies in: model="),
        ("model=folder/absent", "If a model of the hub is meant, say so: model=hub model.name=folder/absent."),
        ("data=absent.txt", "data=absent.txt: there is no such file or folder"),
        ("data=wikitext", "data=wikitext does not exist. Did you mean wikitext2?"),
    ],
)
def test_what_is_not_there_is_said_at_once(cli: Callable[..., Any], text: Path, setting: str, message: str) -> None:
    Path("folder").mkdir()
    done = cli(setting)
    assert done.status == 1 and done.err.startswith("error: ") and message in done.err
    assert sorted(path.name for path in Path().iterdir()) == ["folder", "mine.txt"]


def test_a_grid_over_texts_and_models(cli: Callable[..., Any], text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "other.txt").write_text(text.read_text().replace("word", "line"), encoding="utf-8")
    done = cli("-m", "model=tiny_random", "data=mine.txt,texts", *SHORT, "tracking=none", "hydra.sweep.dir=out")
    assert done.status == 0, done.err
    records = [read_record(path.parent) for path in sorted(Path("out").glob("*/record.json"))]
    assert sorted(record.choices["data"] for record in records) == ["mine.txt", "texts"]
    assert len({record.config_hash for record in records}) == 2
    for record in records:
        assert record.provenance["calibration"]["corpus"]["part"] == "calibration"
        assert record.provenance["files"].keys() == {record.choices["data"]}
    again = cli("-m", "model=tiny_random", "data=mine.txt,texts", *SHORT, "tracking=none", "hydra.sweep.dir=out")
    assert "2 of them finished before" in again.err


def test_python_splits_as_the_command_line_does(cli: Callable[..., Any], text: Path, dense: Path) -> None:
    done = cli(f"model={dense}", "data=mine.txt", *SHORT, "tracking=none", "hydra.run.dir=out")
    assert done.status == 0, done.err
    record = read_record(Path("out"))
    result = bs_exp.compress(dense, data="mine.txt", overrides=SHORT[:1], quiet=True)
    assert result.calibration["sha256"] == record.provenance["calibration"]["sha256"]
    found = bs_exp.evaluate(result.model, result.tokenizer, data="mine.txt", overrides=SHORT[1:])
    assert found == {name: record.metrics["compressed"][name] for name in found}
    assert found.keys() >= {"ppl/text", "ppl_text_sha256/text"}
