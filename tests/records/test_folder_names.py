"""Folders of points read like settings, and are found by their hash whatever they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from bs_exp.records.folder_names import point_folder, run_words, sweep_folder

HASH = "0a1b2c3d4e5f6789" * 4


def test_a_run_is_its_preset_and_ratio_and_what_else_was_set() -> None:
    settings = ["experiment=svd", "retain_ratio=0.8", "name=mine", "sharing.group_size=2"]
    assert run_words("svd", 0.8, settings) == ["svd@0.8", "sharing.group_size=2"]
    assert run_words("svd", None) == ["svd"]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ((), "0a1b2c3d4e5f"),
        (("svd@0.8",), "svd@0.8-0a1b2c3d4e5f"),
        (("svd@0.8", "sharing.group_size=2", "seed=1"), "svd@0.8+group_size-2+seed-1-0a1b2c3d4e5f"),
        (("svd@0.8", "allocation.by_depth.0=1.5"), "svd@0.8+by_depth.0-1.5-0a1b2c3d4e5f"),
        (("svd@0.8", "calibration.files=[a/b c.txt,../d]"), "svd@0.8+files-a-b-c.txt-..-d-0a1b2c3d4e5f"),
        (("svd@0.8", *(f"a.dial_{i}=0.123456789" for i in range(9))), None),
        (("/" * 500,), "0a1b2c3d4e5f"),
    ],
)
def test_name_of_a_point(words: tuple[str, ...], name: str | None, tmp_path: Path) -> None:
    found = point_folder(tmp_path, HASH, words)
    assert found == name or (name is None and found.startswith("svd@0.8+dial_0-0.123456789+"))
    assert len(found) < 80 and found.endswith("0a1b2c3d4e5f")
    # Pasted into a shell and as the value of a setting it needs no quotes.
    assert OverridesParser.create().parse_override(f"model.path=sweep/{found}/model").value() == f"sweep/{found}/model"


def test_an_existing_folder_is_found_by_its_hash(tmp_path: Path) -> None:
    (tmp_path / "0a1b2c3d4e5f").mkdir()
    (tmp_path / "svd@0.5-111111111111").mkdir()
    assert point_folder(tmp_path, HASH, ["svd@0.8"]) == "0a1b2c3d4e5f"
    (tmp_path / "svd@0.8-0a1b2c3d4e5f").mkdir()
    assert point_folder(tmp_path, HASH, ["svd@0.8"]) == "svd@0.8-0a1b2c3d4e5f"
    (tmp_path / "grid-12345678").mkdir()
    assert sweep_folder(tmp_path, "grid", ["calibration.files=[a b]"], "12345678") == "grid-12345678"
    assert sweep_folder(tmp_path, "grid", ["calibration.files=[a b]"], "87654321") == "grid,files=a-b-87654321"


def test_what_varies_stands_first_in_the_name_of_a_sweep() -> None:
    settings = ["evaluation.parts=[ppl,acc]", "retain_ratio=range(0.4,0.9,0.1)", "seed=1,2"]
    found = sweep_folder(None, "grid", settings, "12345678")
    assert found == "grid,retain_ratio=range0.4,0.9,0.1,seed=1,2,parts=ppl,acc-12345678"
