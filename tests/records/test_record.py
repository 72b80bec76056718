"""A record is strict JSON, whole at every moment, and says how the run ended, whatever ended it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_exp.errors import DataError, RecordError, TrackingError
from bs_exp.progress import Progress
from bs_exp.records.record import FILE_NAME, RunRecord, Status, read_record, write_record
from bs_exp.runs.recorder import Recorder, new_record


def _record(folder: Path, **changes: Any) -> RunRecord:
    return new_record(name="test", config={"seed": 0}, config_hash="ab" * 32, folder=folder, **changes)


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(_record(tmp_path), tmp_path, Progress(quiet=True))


def _refuse_constants(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


@given(st.dictionaries(st.text(), st.floats(allow_nan=True, allow_infinity=True)))
def test_metrics_survive_strict_json(metrics: dict[str, float]) -> None:
    record = RunRecord.from_dict({**_BARE, "metrics": {"dense": metrics}})
    text = json.dumps(record.to_dict(), allow_nan=False)
    read = RunRecord.from_dict(json.loads(text, parse_constant=_refuse_constants))
    assert read.metrics["dense"].keys() == metrics.keys()
    for name, value in metrics.items():
        found = read.metrics["dense"][name]
        assert found == value or (math.isnan(found) and math.isnan(value))


_BARE = {
    "format_version": 1,
    "name": "test",
    "run_id": "x",
    "status": "completed",
    "started": "2000-01-01T00:00:00+00:00",
    "command": [],
    "config": {},
    "config_hash": "x",
    "process": 1,
    "notes": [],
}


def test_read_is_the_inverse_of_write(tmp_path: Path) -> None:
    record = _record(tmp_path, sweep={"id": "s", "job": 3})
    path = write_record(record, tmp_path)
    assert read_record(path) == read_record(tmp_path) == record


def test_record_knows_where_it_ran(tmp_path: Path) -> None:
    record = _record(tmp_path)
    assert record.versions["python"].startswith("3.")
    assert record.versions["torch"] and record.versions["transformers"] and record.versions["lm-eval"]
    assert record.hardware["cpu_cores"] >= 1
    assert record.hardware["memory_bytes"] > 2**20
    assert record.status == "running"


def test_run_id_is_that_of_configuration_and_folder(tmp_path: Path) -> None:
    assert _record(tmp_path).run_id == _record(tmp_path).run_id
    assert _record(tmp_path).run_id != _record(tmp_path / "other").run_id


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"format_version": 1, "name": "te', "half-written"),
        ("[]", "no JSON object"),
        ('{"format_version": 99}', "format_version is 99"),
        (json.dumps({**_BARE, "colour": "red"}), "unknown fields colour"),
        (json.dumps({**_BARE, "status": "fine"}), "fine"),
        (json.dumps({key: value for key, value in _BARE.items() if key != "run_id"}), "run_id"),
    ],
)
def test_unreadable_record_says_why_and_where(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(content)
    with pytest.raises(RecordError, match=complaint) as caught:
        read_record(tmp_path)
    assert str(path) in str(caught.value)


def test_missing_record_says_where(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=str(tmp_path)):
        read_record(tmp_path)


def test_failed_write_leaves_the_old_record_whole(tmp_path: Path) -> None:
    old = _record(tmp_path)
    write_record(old, tmp_path)
    with pytest.raises(TypeError):
        write_record(RunRecord.from_dict({**_BARE, "size": {"bytes": object()}}), tmp_path)
    assert read_record(tmp_path) == old
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_unwritable_folder_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecordError, match=r"hydra\.run\.dir"):
        write_record(_record(tmp_path), tmp_path / "file")


def test_run_is_visible_from_its_start(recorder: Recorder, tmp_path: Path) -> None:
    with recorder:
        assert read_record(tmp_path).status == Status.RUNNING
        with recorder.progress.stage("load"):
            pass
        recorder.update(metrics={"dense": {"ppl/text": 3.0}})
        assert read_record(tmp_path).metrics == {"dense": {"ppl/text": 3.0}}
    record = read_record(tmp_path)
    assert record.status == Status.COMPLETED
    assert record.finished is not None
    assert record.timings.keys() == {"load"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DataError("too short"), Status.FAILED),
        (KeyError("bug"), Status.FAILED),
        (OSError(28, "No space left on device"), Status.FAILED),
        (KeyboardInterrupt(), Status.INTERRUPTED),
        (SystemExit(143), Status.INTERRUPTED),
    ],
)
def test_what_ends_a_run_is_recorded_and_goes_on(
    recorder: Recorder, tmp_path: Path, error: BaseException, status: Status
) -> None:
    with pytest.raises(type(error)) as caught, recorder, recorder.progress.stage("calibrate"):
        raise error
    assert caught.value is error
    record = read_record(tmp_path)
    assert record.status == status
    assert record.error is not None
    assert record.error["type"] == type(error).__name__
    assert record.error["stage"] == "calibrate"
    assert "test_record.py" in record.error["traceback"]


class BrokenTracker:
    """A service that fails at one call."""

    def __init__(self, fails_at: str) -> None:
        self.fails_at = fails_at

    def start(self, record: Mapping[str, object], folder: Path) -> BrokenTracker:
        self._call("start")
        return self

    def log(self, metrics: Mapping[str, object]) -> None:
        self._call("log")

    def finish(self, record: Mapping[str, object]) -> None:
        self._call("finish")

    def _call(self, name: str) -> None:
        if name == self.fails_at:
            raise TrackingError(f"cannot {name}.")


@pytest.mark.parametrize("call", ["start", "log", "finish"])
def test_run_goes_on_without_its_tracker(recorder: Recorder, tmp_path: Path, call: str) -> None:
    with recorder:
        recorder.track(BrokenTracker(call))
        recorder.log({"ppl/text": 3.0})
        recorder.log({"acc/task": 0.5})
    record = read_record(tmp_path)
    assert record.status == Status.COMPLETED
    assert [note for note in record.notes if f"cannot {call}" in note] == list(record.notes)
    assert len(record.notes) == 1


class WatchingTracker(BrokenTracker):
    """Remembers the status with which it was closed."""

    finished: str | None = None

    def finish(self, record: Mapping[str, object]) -> None:
        assert self.finished is None
        self.finished = str(record["status"])


@pytest.mark.parametrize(("error", "status"), [(DataError("x"), "failed"), (KeyboardInterrupt(), "interrupted")])
def test_tracker_is_closed_whatever_happens(recorder: Recorder, error: BaseException, status: str) -> None:
    tracker = WatchingTracker("never")
    with pytest.raises(type(error)), recorder:
        recorder.track(tracker)
        raise error
    assert tracker.finished == status
