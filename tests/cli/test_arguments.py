"""Settings as people type them: where flags stand, `~`, and how to quote what Hydra's grammar does not take."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from bs_exp.cli.arguments import for_hydra, quoted
from bs_exp.cli.explain import explain
from bs_exp.records.record import Status, read_record

ROOT = Path(__file__).parents[2]


def test_flags_may_stand_anywhere() -> None:
    assert for_hydra(["a=1,2", "-m", "b=2"]) == ["-m", "a=1,2", "b=2"]
    assert for_hydra(["--cfg", "job", "a=1"]) == ["--cfg", "job", "a=1"]


def test_the_home_folder_is_expanded_in_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = ["cache.dir=~/c", "files=['~/a.txt',~/b.txt]", "x=a~/b", "~deleted", "hydra.run.dir='~'"]
    expected = [
        "cache.dir=/home/me/c",
        "files=['/home/me/a.txt',/home/me/b.txt]",
        *given[2:4],
        "hydra.run.dir='/home/me'",
    ]
    assert for_hydra(given) == expected


@pytest.mark.parametrize(
    "value",
    ["a=b", "it's", "(x)", "a b", "ü", "#1", "a:b", "{x}", "[open", 'say "no"', "a\\", "back\\'s", "$HOME", "~x"],
)
def test_a_quoted_setting_survives_shell_and_grammar(value: str) -> None:
    line = quoted(f"cache.dir={value}")
    assert line is not None
    [argument] = shlex.split(line)
    shell = subprocess.run(["sh", "-c", f"printf %s {line}"], capture_output=True, text=True, check=True)
    assert shell.stdout == argument
    assert OverridesParser.create().parse_override(argument).value() == value


def test_elements_of_a_list_are_quoted_one_by_one() -> None:
    line = quoted("calibration.files=[/a b.txt,'/c#d.txt']")
    assert line == "\"calibration.files=['/a b.txt','/c#d.txt']\""


def test_a_path_with_signs_is_refused_with_the_line_to_paste(cli: Callable[..., Any]) -> None:
    done = cli("cache.dir=/tmp/a(b")
    assert done.status == 1 and "\"cache.dir='/tmp/a(b'\"" in done.err and "Traceback" not in done.err
    done = cli("nonsense")
    assert done.status == 1 and "Settings have the form key=value" in done.err


def test_a_group_without_an_option_names_them(cli: Callable[..., Any]) -> None:
    done = cli("layout=null")
    assert done.status == 1
    assert done.err == "error: layout=null: a group needs one of its options. Options of layout: pivoted, plain.\n"


def test_an_interruption_is_one_whatever_a_library_makes_of_it() -> None:
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise AttributeError("'NoneType' object has no attribute 'x'") from None
    except AttributeError as error:
        assert explain(error) == "interrupted."


def test_a_full_disk_is_told_without_a_file_name_too() -> None:
    assert "the disk is full (No space left on device)" in explain(OSError(28, os.strerror(28)))
    assert "while writing /x/y" in explain(OSError(28, os.strerror(28), "/x/y"))


def test_a_closed_terminal_ends_a_run_as_an_order_to_stop(tiny: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bs_exp", *tiny, "update=recover", "update.steps=100000", "hydra.run.dir=out"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "record.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP, said
    assert read_record(tmp_path / "out").status is Status.INTERRUPTED


def test_a_terminal_without_the_signs_of_the_table(tiny: tuple[str, ...], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bs_exp", *tiny, "experiment=svd_llm"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"svd_llm: completed" in done.stdout and b"ppl/text" in done.stdout
