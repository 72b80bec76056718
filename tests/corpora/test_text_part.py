"""Text in two parts: nothing of the evaluated one is calibrated on, nothing is lost, and the same text splits alike."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from bs_exp.corpora.text_part import TextPart
from bs_exp.errors import ConfigError, DataError

_WORDS = ["low", "rank", "basis", "layer", "matrix", "share", "weight", "token", "model", "value", "query", "head"]


def _paragraphs(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"{number}: " + " ".join(draw.choices(_WORDS, k=40)) for number in range(count)]


def _parts(path: Path) -> tuple[str, str]:
    calibration, evaluation = (
        TextPart(files=[str(path)], part=part).read()[0] for part in ("calibration", "evaluation")
    )
    return calibration, evaluation


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_every_unit_is_in_one_part(tmp_path: Path, suffix: str) -> None:
    units = _paragraphs(400)
    rows = "\n".join(json.dumps({"text": unit}) for unit in units)
    path = tmp_path / f"text{suffix}"
    path.write_text(rows if suffix == ".jsonl" else "\n\n".join(units))
    calibration, evaluation = (part.split("\n\n") for part in _parts(path))
    assert sorted(calibration + evaluation) == sorted(units)
    assert 0.1 < len(evaluation) / len(units) < 0.25
    assert _parts(path) == _parts(path)


@pytest.mark.parametrize(("joiner", "unit"), [("\n\n", "paragraphs"), ("\n", "lines"), (" ", "words")])
def test_the_coarsest_units_that_give_enough_blocks(tmp_path: Path, joiner: str, unit: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text(joiner.join(_paragraphs(100)))
    text, origin = TextPart(files=[str(path)], part="evaluation").read()
    assert (origin["unit"], origin["part"], origin["documents"]) == (unit, "evaluation", 1)
    assert origin["blocks"] >= 2 and len(text) == origin["characters"]


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    units = _paragraphs(60)
    for number, unit in enumerate(units):
        place = tmp_path / ("b" if number % 2 else "a")
        place.mkdir(exist_ok=True)
        (place / f"{number:02}.txt").write_text(unit)
    (tmp_path / "picture.png").write_bytes(b"\x00")
    (tmp_path / ".hidden.txt").write_text("not read")
    calibration, evaluation = (part.split("\n\n") for part in _parts(tmp_path))
    assert sorted(calibration + evaluation) == sorted(units)
    in_order = units[::2] + units[1::2]
    assert calibration == [unit for unit in in_order if unit in set(calibration)]


def test_what_repeats_is_not_evaluated(tmp_path: Path) -> None:
    units = _paragraphs(100)
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join([*units[:50], *units[:50], *units[50:]]))
    calibration, evaluation = (part.split("\n\n") for part in _parts(path))
    assert not set(calibration) & set(evaluation)
    assert set(calibration) | set(evaluation) <= set(units)


def test_blocks_at_even_distances(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(_paragraphs(2000)))
    whole, everything = TextPart(files=[str(path)], part="calibration").read()
    text, origin = TextPart(files=[str(path)], part="calibration", max_characters=100_000).read()
    assert 80_000 < len(text) <= 100_000 < len(whole)
    assert origin["available"] == everything["blocks"] > origin["blocks"]
    assert text.startswith("0: ") and set(text.split("\n\n")) <= set(whole.split("\n\n"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("too short. " * 100, r"text.txt holds 1,100 characters, too little .* at least 10,000 are needed\. Use more"),
        ("\n\n".join(["The same paragraph again and again, which is as long as it must be to count." * 2] * 300),
         "repeats itself: all paragraphs"),
    ],
)  # fmt: skip
def test_text_that_cannot_be_split_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        TextPart(files=[str(path)], part="calibration").read()


def test_settings_and_folders_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="part must be one of calibration, evaluation, got 'test'"):
        TextPart(files=["a.txt"], part="test")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_characters"):
        TextPart(files=["a.txt"], part="evaluation", max_characters=0)
    with pytest.raises(DataError, match="holds no text files"):
        TextPart(files=[str(tmp_path)], part="evaluation").read()
