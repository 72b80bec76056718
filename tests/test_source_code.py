"""Whose code a configuration names, found without importing it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bs_exp.source_code import sources, targets_code


def _write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / (name.replace("__", "/", 1) if "__" in name and not name.startswith("__") else name)
        path = path.with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_only_code_of_others_counts() -> None:
    ours = {"_target_": "bs_exp.whitening.gram.GramWhitening", "x": [{"_target_": "optuna.samplers.TPESampler"}]}
    assert targets_code({"whitening": ours, "y": {"_target_": "collections.OrderedDict"}}) == {}


def test_a_target_is_told_by_its_file_and_nothing_is_imported(folder: Path) -> None:
    _write(folder, alone_a="raise AssertionError\n")
    found = targets_code({"whitening": {"_target_": "alone_a.Mine", "ridge": 1}, "list": [{"_target_": "alone_a.f"}]})
    digest = hashlib.sha256(b"raise AssertionError\n").hexdigest()
    assert found == {"alone_a.Mine": {"alone_a": digest}, "alone_a.f": {"alone_a": digest}}
    assert "alone_a" not in sys.modules


def test_packages_relative_imports_and_helpers_are_followed(folder: Path) -> None:
    package = folder / "alone_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("from alone_pkg.white import Mine\n", encoding="utf-8")
    (package / "white.py").write_text(
        "import torch, json\nfrom . import maths\nfrom .deep.inner import f\nfrom bs_exp.types import Metric\n"
        "def g():\n    import alone_helper\n",
        encoding="utf-8",
    )
    (package / "maths.py").write_text("from alone_pkg import white\n", encoding="utf-8")  # a circle
    (package / "unused.py").write_text("", encoding="utf-8")
    (package / "deep").mkdir()
    (package / "deep" / "inner.py").write_text("f = 1\n", encoding="utf-8")
    _write(folder, alone_helper="")
    expected = {"alone_pkg", "alone_pkg.white", "alone_pkg.maths", "alone_pkg.deep.inner", "alone_helper"}
    for target in ("alone_pkg.Mine", "alone_pkg.white.Mine", "alone_pkg.white.Mine.make"):
        assert set(targets_code([{"_target_": target}])[target]) == expected


def test_of_what_is_installed_only_its_own_package_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    _write(site, installed_plugin="import installed_library\n", installed_library="")
    assert set(sources("installed_plugin")) == {"installed_plugin"}


def test_what_cannot_be_found_or_read_is_left_to_who_imports_it(folder: Path) -> None:
    _write(folder, alone_broken="def (:\n")
    assert targets_code({"_target_": "no_such_module_anywhere.Mine"}) == {}
    assert set(sources("alone_broken")) == {"alone_broken"}


def test_a_script_counts_by_its_file(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from bs_exp.source_code import sources\nprint(sources('__main__'))\n", encoding="utf-8")
    run = [sys.executable, str(script)]
    found = subprocess.run(run, capture_output=True, text=True, check=True, env=_environment()).stdout
    assert hashlib.sha256(script.read_bytes()).hexdigest() in found


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
