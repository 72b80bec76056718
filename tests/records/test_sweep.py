"""A sweep on disk: who owns a point, what is finished, and what the user reads about it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bs_exp.errors import RecordError
from bs_exp.records.record import FILE_NAME, SAVED_FILES, RunRecord, Status, write_record
from bs_exp.records.sweep import (
    PLAN_FILE,
    PointOutcome,
    PointState,
    SweepPlan,
    SweepPoint,
    duration,
    finished_record,
    kept_objective,
    occupied,
    progress_line,
    survey,
    varying,
)
from bs_exp.runs.sweep_table import print_sweep

ROOT = Path(__file__).parents[2]
BEFORE, START, AFTER = (f"2026-01-01T0{hour}:00:00+00:00" for hour in (1, 2, 3))


def _record(**changes: Any) -> RunRecord:
    base = RunRecord(
        name="run",
        run_id="id",
        status=Status.COMPLETED,
        started=START,
        finished=AFTER,
        command=("python",),
        config={"objective": None},
        config_hash="hash",
        process=1,
        metrics={"compressed": {"ppl/text": 12.5}},
        objective=12.5,
    )
    return replace(base, **changes)


def _plan(*folders: str) -> SweepPlan:
    return SweepPlan("mine", ("python",), START, tuple(SweepPoint(f, ("seed=1", f"x={f}")) for f in folders))


@pytest.mark.parametrize(
    ("changes", "with_model", "finished"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"model_folder": "model"}, True, True),
        ({"model_folder": "lost"}, True, False),
        ({"status": Status.FAILED}, False, False),
        ({"status": Status.INTERRUPTED}, False, False),
        ({"status": Status.RUNNING, "finished": None}, False, False),
        ({"config_hash": "other"}, False, False),
    ],
)
def test_finished_is_completed_with_this_configuration(
    tmp_path: Path, changes: dict[str, Any], with_model: bool, finished: bool
) -> None:
    (tmp_path / "model").mkdir()
    write_record(_record(**changes), tmp_path)
    assert (finished_record(tmp_path, "hash", with_model=with_model) is not None) == finished


def test_nothing_and_half_a_record_are_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finished_record(tmp_path, "hash", with_model=False) is None
    assert capsys.readouterr().err == ""
    (tmp_path / FILE_NAME).write_text('{"format_version"')
    assert finished_record(tmp_path, "hash", with_model=False) is None
    assert f"{tmp_path}/{FILE_NAME} is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"started": None}, {"config": None}, {"sweep": {"settings": 5}}, {"finished": 5}])
def test_a_record_of_a_wrong_kind_is_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    path = write_record(_record(), tmp_path / "a")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert finished_record(tmp_path / "a", "hash", with_model=False) is None
    words = capsys.readouterr().err
    assert str(path) in words and next(iter(change)) in words and "The point is run again." in words
    for plan in (_plan("a"), SweepPlan("mine", ("python",), START, None)):
        assert [state.outcome for state in survey(tmp_path, plan)] == [PointOutcome.NOT_RUN]


def test_a_sweeper_gets_back_what_the_run_returned() -> None:
    assert kept_objective(_record()) == 12.5
    assert kept_objective(_record(objective={"ppl/text": 12.5, "size/bytes": 3.0})) == (12.5, 3.0)
    assert kept_objective(_record(objective=None)) is None


_HOLD = """
import sys, time
from pathlib import Path
from bs_exp.records.sweep import occupied
with occupied(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
    Path(sys.argv[1], "done").touch()
"""


def _hold(folder: Path) -> subprocess.Popen[str]:
    other = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    return other


def test_a_point_belongs_to_one_process_and_others_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "point"
    with _hold(folder) as other:
        write_record(_record(status=Status.RUNNING, finished=None), folder)
        assert [state.outcome for state in survey(tmp_path, _plan("point"))] == [PointOutcome.RUNNING]
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.close()
        with occupied(folder):
            assert (folder / "done").exists()
    # Who holds it is known as long as it is held; it may also have ended before we came, and nobody had to wait.
    owners = ("another process", f"process {other.pid} on {os.uname().nodename}")
    assert capsys.readouterr().err in ("", *(f"point is under way in {o}: waiting for it to end.\n" for o in owners))


def test_a_killed_process_lets_go(tmp_path: Path) -> None:
    folder = tmp_path / "point"
    with _hold(folder) as other:
        write_record(_record(status=Status.RUNNING, finished=None), folder)
        other.kill()
        other.wait()
        assert [state.outcome for state in survey(tmp_path, _plan("point"))] == [PointOutcome.KILLED]
        with occupied(folder):
            assert not (folder / "done").exists()


def test_survey_tells_new_from_old(tmp_path: Path) -> None:
    write_record(_record(), tmp_path / "new")
    write_record(_record(started=BEFORE, finished=BEFORE), tmp_path / "old")
    write_record(_record(status=Status.FAILED), tmp_path / "failed")
    write_record(_record(status=Status.FAILED, started=BEFORE, finished=BEFORE), tmp_path / "failed_before")
    write_record(_record(status=Status.RUNNING, finished=None), tmp_path / "killed")
    names = ("new", "old", "failed", "failed_before", "killed", "absent")
    assert [str(state.outcome) for state in survey(tmp_path, _plan(*names))] == [
        *("completed", "kept", "failed", "not run", "killed", "not run")
    ]


def test_points_without_a_plan_are_those_on_disk(tmp_path: Path) -> None:
    sweep = {"id": "mine", "job": 0, "settings": ["x=1"]}
    write_record(_record(sweep=sweep), tmp_path / "b")
    write_record(_record(sweep=sweep, started=BEFORE), tmp_path / "a")
    states = survey(tmp_path, SweepPlan("mine", ("python",), START, None))
    assert [(state.point.folder, state.point.settings) for state in states] == [("a", ("x=1",)), ("b", ("x=1",))]


def test_plan_comes_back_from_disk(tmp_path: Path) -> None:
    assert SweepPlan.read(tmp_path) is None
    for plan in (_plan("a", "b"), SweepPlan("mine", ("python",), START, None)):
        plan.write(tmp_path)
        assert SweepPlan.read(tmp_path) == plan
        assert [path.name for path in tmp_path.iterdir()] == [PLAN_FILE]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"points": 5}, "points is no list"),
        ({"points": [{"folder": "a"}]}, r"points\[0\].settings is missing"),
        ({"started": 5}, "started is no time"),
        ({"name": None}, "name is no text"),
        ({"colour": "red"}, "unknown fields colour"),
        ("null", "holds no JSON object"),
        ("", "half-written"),
        ("[" * 200_000, "is not JSON"),
    ],
)
def test_a_damaged_plan_is_named(tmp_path: Path, change: dict[str, Any] | str, complaint: str) -> None:
    _plan("a").write(tmp_path)
    path = tmp_path / PLAN_FILE
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RecordError, match=complaint) as caught:
        SweepPlan.read(tmp_path)
    assert "sweep.json is no plan of a sweep" in str(caught.value)


def test_settings_in_common_are_not_repeated() -> None:
    assert varying([("m=1", "x=1"), ("m=1", "x=2")]) == ["x=1", "x=2"]
    assert varying([("m=1", "x=1")]) == ["m=1 x=1"]
    assert varying([]) == []


def test_progress_line_counts_and_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    # Five hours after the start, one point ended, one was there before, one is left: as long again.
    monkeypatch.setattr("time.time", lambda: 1767225600.0 + 7 * 3600)
    plan = _plan("a", "b", "c")
    assert plan.points is not None
    outcomes = (PointOutcome.COMPLETED, PointOutcome.KEPT, PointOutcome.NOT_RUN)
    states = [
        PointState(point, outcome, None if outcome is PointOutcome.NOT_RUN else _record())
        for point, outcome in zip(plan.points, outcomes, strict=True)
    ]
    assert progress_line(states, "a", plan) == "[2/3] completed x=a  ppl/text 12.5  60 min; about 5.0 h left"
    assert progress_line(states, "b", plan).startswith("[2/3] kept x=b  ppl/text 12.5; about")
    assert progress_line(states, "z", plan) == "z ended"


def test_the_table_names_every_point_and_what_to_do(tmp_path: Path) -> None:
    write_record(_record(), tmp_path / "a")
    error = {"type": "ConfigError", "message": "x must be small, got [b].\nRecorded", "stage": None, "traceback": ""}
    write_record(_record(status=Status.FAILED, error=error, objective=None), tmp_path / "b")
    out = io.StringIO()
    print_sweep("mine", tmp_path, survey(tmp_path, _plan("a", "b")), Console(file=out, width=100))
    text = out.getvalue()
    assert [line.split() for line in text.splitlines() if line.startswith(" x=")] == [
        ["x=a", "completed", "12.5", "60", "min", "a"],
        ["x=b", "failed", "b"],
    ]
    assert "failed   b: x must be small, got [b].\n" in text
    assert "points   2: 1 completed, 1 failed\n" in text
    assert "the same command again" in text
    assert f"bs-exp report {tmp_path}\n" in text


def test_the_best_is_named_among_points_that_kept_the_same(tmp_path: Path) -> None:
    for name, value, kept in (("a", 12.5, 0.8), ("b", 11.0, 0.797), ("c", 10.0, 0.9)):
        write_record(_record(objective=value, size={"retain_ratio": kept}), tmp_path / name)
    out = io.StringIO()
    print_sweep("mine", tmp_path, survey(tmp_path, _plan("a", "b", "c")), Console(file=out, width=100))
    assert [line for line in out.getvalue().splitlines() if line.startswith("best")] == [
        "best     ppl/text 11 with 79.7% kept: x=b"
    ]
    assert "80.0%" in out.getvalue() and "90.0%" in out.getvalue()


@pytest.mark.parametrize(("value", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2.0 h")])
def test_durations_are_read_at_a_glance(value: float, text: str) -> None:
    assert duration(value) == text


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("model.safetensors", b"123", "model.safetensors has 3 bytes, 5 were saved"),
        ("model.safetensors", None, "model.safetensors is gone"),
        ("config.json", b"", "config.json has 0 bytes, 2 were saved"),
        ("sub/tokenizer.json", None, "sub/tokenizer.json is gone"),
    ],
)
def test_a_point_whose_saved_model_is_cut_is_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes | None, complaint: str
) -> None:
    files = {"model.safetensors": b"12345", "config.json": b"{}", "sub/tokenizer.json": b"[]"}
    for name, data in files.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(data)
    noted = {SAVED_FILES: {name: len(data) for name, data in files.items()}}
    write_record(_record(model_folder="model", provenance=noted), tmp_path)
    assert finished_record(tmp_path, "hash", with_model=True) is not None
    (tmp_path / "model" / file).unlink()
    if content is not None:
        (tmp_path / "model" / file).write_bytes(content)
    assert finished_record(tmp_path, "hash", with_model=True) is None
    assert complaint in capsys.readouterr().err
    assert finished_record(tmp_path, "hash", with_model=False) is not None


def test_of_an_earlier_version_the_weights_together_are_compared(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"12345")
    write_record(_record(model_folder="model", size={"saved_bytes": 5}), tmp_path)
    assert finished_record(tmp_path, "hash", with_model=True) is not None
    (tmp_path / "model" / "model.safetensors").write_bytes(b"123")
    assert finished_record(tmp_path, "hash", with_model=True) is None


def test_who_holds_a_point_removes_what_killed_processes_left_in_it(tmp_path: Path) -> None:
    (tmp_path / ".record.json.0123456789abcdef.tmp").write_text("half")
    (tmp_path / ".model-abcdefgh" / "new").mkdir(parents=True)
    with occupied(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".owner"]


@pytest.mark.parametrize("name", [".lock", ".owner"])
def test_a_link_in_a_point_is_not_written_through(tmp_path: Path, name: str) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (tmp_path / "point").mkdir()
    (tmp_path / "point" / name).symlink_to(mine)
    try:
        with occupied(tmp_path / "point"):
            pass
    except RecordError:
        assert name == ".lock"
    assert mine.read_text() == "precious"


def test_a_plan_names_folders_of_its_sweep_alone(tmp_path: Path) -> None:
    _plan("../elsewhere").write(tmp_path)
    with pytest.raises(RecordError, match=r"points\[0\]\.folder begins with a dot"):
        SweepPlan.read(tmp_path)
