"""A folder that somebody sent is reported on in seconds, and harms neither files, nor terminal, nor spreadsheet."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.dom import minidom

import pytest

from bs_exp.records.pairs import PAIRS_FILE
from bs_exp.records.record import FILE_NAME, RunRecord, write_record
from bs_exp.records.sweep import PLAN_FILE
from bs_exp.reporting.collect import collect
from bs_exp.reporting.report import write_figures, write_report
from bs_exp.reporting.results import MOST_HEADLINES
from tests.support import synthetic

Cli = Callable[..., Any]
# Processor time of a report on one good record and a hostile one, Matplotlib's first start included.
SECONDS = 15.0
CONTROL = "\x1b[2J\x1b]0;owned\x07\x00\x9b1m\u202e"

FORBIDDEN = set("\x1b\x07\x00\x9b\u202e")


def _received(folder: Path) -> Path:
    """A folder with one good record, and an empty folder `bad`, which is returned."""
    synthetic.write([synthetic.record()], folder)
    (folder / "bad").mkdir()
    return folder / "bad"


def _forged(folder: Path, base: RunRecord | None = None, **changes: Any) -> None:
    """A record as somebody writes it who does not use this program, and so without a checksum."""
    folder.mkdir(exist_ok=True)
    data = {**(base or synthetic.record("forged")).to_dict(), **changes}
    (folder / FILE_NAME).write_text(json.dumps(data))


def _group(**changes: Any) -> dict[str, Any]:
    plan = synthetic.record().plan
    assert plan is not None
    return {**plan["groups"][0], **changes}


def _plan(groups: list[dict[str, Any]]) -> dict[str, Any]:
    return {**(synthetic.record().plan or {}), "groups": groups}


def _config(**changes: Any) -> dict[str, Any]:
    return {**synthetic.record().config, **changes}


def _pipe(place: Path) -> None:
    os.mkfifo(place)


def _device(place: Path) -> None:
    place.symlink_to("/dev/zero")


def _huge(place: Path) -> None:
    with place.open("wb") as file:
        file.truncate(2**40)


def _deep(place: Path) -> None:
    place.write_text("[" * 200_000)


def _many(place: Path) -> None:
    place.write_text(json.dumps({"notes": ["x"] * 3_000_000}))


@pytest.mark.parametrize("name", [FILE_NAME, PLAN_FILE, PAIRS_FILE])
@pytest.mark.parametrize("make", [_pipe, _device, _huge, _deep, _many])
def test_what_is_no_file_of_results_is_named_at_once(tmp_path: Path, make: Callable[[Path], None], name: str) -> None:
    make(_received(tmp_path) / name)
    start = time.process_time()
    (skipped,) = collect([tmp_path]).skipped
    assert time.process_time() - start < SECONDS
    assert skipped.path.name == name and len(skipped.reason) < 600


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "x" * 5_000_000}, "name has 5,000,000 characters, at most 255"),
        ({"notes": ["x"] * 1_000_000}, "notes has 1,000,000 items, at most 10,000"),
        ({"timings": {f"stage {i}": i for i in range(20_000)}}, "timings has 20,000 entries, at most 1,000"),
        ({"config": {"x": [0] * 60_000}}, "config has 60,001 entries, at most 50,000"),
        ({"metrics": {"dense": {f"ppl/{i}": 1.0 for i in range(20_000)}}}, "metrics.dense has 20,000 entries"),
        ({"plan": _plan([_group(layers=[10**9])])}, "layers[0] is no number below 10,000 (it is 1000000000)"),
        ({"plan": _plan([_group(layers=[-5])])}, "layers[0] is no whole number of at least 0 (it is -5)"),
        ({"plan": _plan([_group(layers=[i]) for i in range(100_000)])}, "plan.groups has 100,000 items"),
        ({"plan": _plan([_group(d_in=10**240, d_out=10**240)])}, "d_in is no number below 1,000,000,000"),
        ({"config": {"k" * 5_000_000: [0] * 500_000}}, "config has 500,001 entries"),
        ({"config": {"retain_ratio": 1e300}}, "config.retain_ratio is beyond 1e+250"),
        ({f"field {i}" + "x" * 1000: 1 for i in range(1000)}, "and 995 more"),
    ],
)
def test_records_beyond_any_model_are_refused_in_a_line(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    _forged(_received(tmp_path), **changes)
    start = time.process_time()
    (skipped,) = collect([tmp_path]).skipped
    assert time.process_time() - start < SECONDS
    assert reason in skipped.reason and len(skipped.reason) < 600 and "\n" not in skipped.reason


@pytest.mark.parametrize(
    ("layers", "tables", "reason"),
    [
        ([0, 10**9], 1, "layers[1] is no number below 10,000 (it is 1000000000)"),
        (list(range(1001)), 1, "layers has 1,001 items, at most 1,000"),
        ([], 1, "layers is no list with something in it"),
        ([0, 1], 33, "tables has 33 items, at most 32"),
    ],
)
def test_tables_of_pairs_beyond_any_model_are_refused(
    tmp_path: Path, layers: list[int], tables: int, reason: str
) -> None:
    table = {"matrix": "q", "layers": layers, "values": [[1.0] * len(layers)] * len(layers)}
    (_received(tmp_path) / PAIRS_FILE).write_text(json.dumps({"unit": "x", "tables": [table] * tables}))
    (skipped,) = collect([tmp_path]).skipped
    assert reason in skipped.reason


_PERPLEXITIES = {f"ppl/{i}": 1.0 + i for i in range(3000)}


@pytest.mark.parametrize(
    "pair",
    [
        [{"config": _config(x={str(i): i + j for i in range(20_000)})} for j in (0, 1)],
        [{"config": _config(x="W" * 5_000_000)}, {"config": _config(x="V" * 5_000_000)}],
        [{"config": _config(model={"name": "W" * 5_000_000})}],
        [{"plan": _plan([_group(matrix=f"m{i}", layers=[i % 9999]) for i in range(20_000)])}],
        [{"plan": _plan([_group(matrix="qkvo"[i % 4], layers=[i // 4]) for i in range(20_000)])}],
        [{"timings": {f"{i} {'s' * 1000}": 1.0 for i in range(1000)}}],
        [{"config": _config(retain_ratio=value)} for value in (1e200, "NaN", -5, True)],
        [
            {"metrics": {"dense": _PERPLEXITIES, "compressed": _PERPLEXITIES}, "config": _config(retain_ratio=ratio)}
            for ratio in (0.5, 0.6)
        ],
        [{"metrics": {"dense": {"ppl/a": 1e-300}, "compressed": {"ppl/a": 1e249}}, "size": {"bytes": 10**249}}],
    ],
    ids=["settings", "long settings", "model name", "matrices", "layers", "stages", "ratios", "metrics", "numbers"],
)
def test_what_is_allowed_takes_seconds(tmp_path: Path, pair: list[dict[str, Any]]) -> None:
    _received(tmp_path)
    for i, changes in enumerate(pair):
        _forged(tmp_path / str(i), **changes)
    start = time.process_time()
    written = write_report([tmp_path], tmp_path / "out")
    assert time.process_time() - start < SECONDS
    assert len(written.study.points) == len(pair) + 1
    assert sum(path.stat().st_size for path in written.files) < 64 * 2**20
    assert len([path for path in written.files if "-curve-" in path.name]) <= 2 * MOST_HEADLINES


def test_links_are_followed_within_the_folder_and_not_far_beyond(tmp_path: Path) -> None:
    received, elsewhere = tmp_path / "received", tmp_path / "elsewhere"
    synthetic.write([synthetic.record()], received / "runs")
    write_record(synthetic.record("a"), elsewhere / "run")
    write_record(synthetic.record("b"), elsewhere / "deep" / "er" / "run")
    (received / "up").symlink_to("..")
    (received / "again").symlink_to("runs")
    (received / "there").symlink_to(elsewhere)
    (received / "root").symlink_to("/")
    (received / "self").symlink_to("self")
    start = time.process_time()
    names = sorted(found.record.name for found in collect([received]).found)
    assert time.process_time() - start < SECONDS
    assert names == ["a", "svd_llm"]


def test_escape_codes_reach_neither_terminal_nor_figures_nor_tables(cli: Cli, tmp_path: Path) -> None:
    base = synthetic.record(CONTROL + "|a\nb", 0.2, changes={"x": CONTROL}, timings={CONTROL: 3.0})
    for i, removed in enumerate((0.2, 0.5)):
        _forged(tmp_path / f"{i}", base, config=_config(retain_ratio=1 - removed, x=CONTROL + str(i)))
    _forged(tmp_path / "c", base, error={"type": CONTROL, "message": CONTROL}, status="failed", notes=[CONTROL])
    table = {"matrix": CONTROL, "layers": [0, 1], "values": [[None, 1.0], [1.0, None]]}
    (tmp_path / "0" / PAIRS_FILE).write_text(json.dumps({"unit": CONTROL, "tables": [table]}))
    (tmp_path / "bad\x1b[2J\nskipped").mkdir()
    (tmp_path / "bad\x1b[2J\nskipped" / FILE_NAME).write_text("{")
    _forged(tmp_path / "unknown", base, **{CONTROL: 1})
    ended = cli("report", str(tmp_path))
    assert ended.status == 0
    assert len(ended.err.splitlines()) == 2 and "\\x1b[2J\\nskipped" in ended.err
    files = [path for path in (tmp_path / "report").rglob("*") if path.is_file()]
    for path in files:
        if path.suffix != ".png":
            text = path.read_text(encoding="utf-8")
            assert not set(text) & FORBIDDEN, path
        if path.suffix == ".svg":
            assert minidom.parseString(path.read_bytes()).documentElement is not None
    assert "\\x1b" in ended.err and not set(ended.out + ended.err) & FORBIDDEN
    lines = (tmp_path / "report" / "tables.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and "|a b" in line.replace("\\|", "|")]
    assert rows and all(line.endswith(" |") for line in rows)


def test_cells_that_begin_a_formula_are_texts(tmp_path: Path) -> None:
    formula = '=HYPERLINK("http://x","y")'
    write_record(replace(synthetic.record(formula), command=("@cmd",)), tmp_path / "a")
    failed = {"type": "+1+1", "message": "-2+3", "stage": "\t=1", "traceback": ""}
    _forged(tmp_path / "b", synthetic.record(formula, 0.4), status="failed", error=failed)
    dense = {"ppl/@SUM(A1)": -1.5}
    _forged(tmp_path / "c", synthetic.record(formula, 0.5), metrics={"dense": dense, "compressed": dense})
    written = write_report([tmp_path], tmp_path / "report")
    cells = []
    for path in written.files:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                cells += [cell for row in csv.reader(file) for cell in row]
    assert not [c for c in cells if c[:1] in ("=", "@", "\t", "\r")]
    assert f"'{formula}" in cells and "'+1+1" in cells and "'-2+3" in cells
    assert "-1.5" in cells  # a number stays one


def test_names_of_metrics_are_names_of_files_in_the_report(tmp_path: Path) -> None:
    names = ["ppl/../../../x", "ppl/\x00\n|a", "ppl/" + "y" * 5000, "ppl/\\g<9>", "ppl/a b", "ppl/a*b", "ppl/plain"]
    found = {name: 1.0 + i for i, name in enumerate(names)}
    for i, ratio in enumerate((0.5, 0.6)):
        both = {"dense": found, "compressed": found}
        _forged(tmp_path / str(i), metrics=both, config=_config(retain_ratio=ratio))
    written = write_report([tmp_path], tmp_path / "out")
    assert all(path.resolve().is_relative_to(tmp_path / "out") for path in written.files)
    assert len([path for path in written.files if "-ppl-" in path.name and path.suffix == ".csv"]) == len(names)
    assert tmp_path / "out" / "tables" / "m1-ppl-plain.csv" in written.files


@pytest.mark.parametrize("command", ["report", "figures"])
@pytest.mark.parametrize("place", ["report", "report/figures"])
def test_no_command_writes_through_a_linked_folder(cli: Cli, tmp_path: Path, command: str, place: str) -> None:
    folder, home = synthetic.write([synthetic.record()], tmp_path / "received"), tmp_path / "home"
    home.mkdir()
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).symlink_to(home, target_is_directory=True)
    ended = cli(command, str(folder))
    assert ended.status == 1 and "is a link, through which nothing is written" in ended.err
    assert not list(home.iterdir())


def test_a_file_in_the_place_of_one_to_write_is_replaced_and_not_written(tmp_path: Path) -> None:
    folder, mine = synthetic.write([synthetic.record(removed=r) for r in (0.2, 0.4)], tmp_path / "r"), tmp_path / "mine"
    mine.write_text("precious")
    names = [path.relative_to(tmp_path / "first") for path in write_report([folder], tmp_path / "first").files]
    for i, name in enumerate([*names, Path(".made.json")]):
        (folder / "report" / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(folder / "report" / name) if i % 2 else (folder / "report" / name).symlink_to(mine)
    written = write_report([folder], folder / "report")
    assert mine.read_text() == "precious"
    assert all(path.is_file() and not path.is_symlink() for path in written.files)


def test_a_list_of_earlier_files_removes_nothing_else(tmp_path: Path) -> None:
    folder = synthetic.write([synthetic.record()], tmp_path / "received")
    out, mine = folder / "report", tmp_path / "mine.svg"
    mine.write_text("mine")
    (out / "figures" / "x.svg").mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    names = [
        "../../mine.svg",
        str(mine),
        "notes.txt",
        "figures",
        "figures/x.svg",
        ".",
        "a\0.svg",
        7,
        "tables/../../x.csv",
    ]
    (out / ".made.json").write_text(json.dumps(names))
    write_report([folder], out)
    assert mine.exists() and (out / "notes.txt").exists() and (out / "figures" / "x.svg").is_dir()
    for broken in ("7", "null", "[" * 100_000, '{"a": 1}'):
        (out / "figures" / ".made.json").write_text(broken)
        write_figures([folder], out / "figures")


def test_hundreds_of_damaged_files_fill_no_screen(cli: Cli, tmp_path: Path) -> None:
    _received(tmp_path)
    for i in range(300):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / FILE_NAME).write_text("{")
    ended = cli("report", str(tmp_path))
    assert len(ended.err.splitlines()) == 21 and "skipped 280 more files" in ended.err
    (tmp_path / "000" / FILE_NAME).unlink()
    ended = cli("report", str(tmp_path))
    assert ended.status == 1 and len(ended.err.splitlines()) == 12 and "and 290 more" in ended.err
