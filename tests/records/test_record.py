"""A record is strict JSON, whole at every moment, and says how the run ended, whatever ended it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_exp.errors import DataError, RecordError, TrackingError
from bs_exp.progress import Progress
from bs_exp.records.parsing import LARGEST
from bs_exp.records.record import FILE_NAME, RunRecord, Status, read_record, write_record
from bs_exp.runs.recorder import Recorder, new_record
from bs_exp.types import ExpertPlace, LossUnit, PlannedGroup, RankPlan, WeightGroup


def _record(folder: Path, **changes: Any) -> RunRecord:
    return new_record(name="test", config={"seed": 0}, config_hash="ab" * 32, folder=folder, **changes)


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(_record(tmp_path), tmp_path, Progress(quiet=True))


def _refuse_constants(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


_NUMBERS = st.floats(-LARGEST, LARGEST) | st.sampled_from([math.nan, math.inf, -math.inf])


@given(st.dictionaries(st.text(), _NUMBERS))
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


GROUP = {"matrix": "q", "layers": [0], "d_in": 4, "d_out": 4, "rank": 2, "parameters": 16} | {
    "predicted_loss": 1.0,
    "ridge": 0.0,
}


def test_read_is_the_inverse_of_write(tmp_path: Path) -> None:
    record = _record(tmp_path, sweep={"id": "s", "job": 3})
    path = write_record(record, tmp_path)
    assert read_record(path) == read_record(tmp_path) == record


def test_a_plan_of_experts_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = {"requested_ratio": 0.5, "groups": [{**GROUP, "matrix": "expert_up", "layers": [[3, 0], [3, 127]]}]}
    (tmp_path / FILE_NAME).write_text(json.dumps({**_BARE, "plan": plan}))
    found = RankPlan.from_dict(read_record(tmp_path).plan or {})
    assert found.groups[0].group.layers == (ExpertPlace(3, 0), ExpertPlace(3, 127))
    assert found.groups[0].group.name == "expert_up[3.0,3.127]"


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


_DEEP: Any = 1
for _ in range(600):
    _DEEP = {"a": _DEEP}

_WRONG: list[tuple[str, Any, str]] = [
    *((field, value, field) for field in ("name", "run_id", "config_hash", "started") for value in (None, 5, [], {})),
    *((field, value, field) for field in ("config", "choices", "selection", "update") for value in (None, 5, [], "x")),
    *((field, value, field) for field in ("metrics", "size", "timings", "memory", "cache") for value in (None, 5, [])),
    *((field, value, field) for field in ("provenance", "versions", "hardware") for value in (None, 5, [], "x")),
    *((field, value, field) for field in ("command", "notes") for value in (None, "text", [5], {"a": 1})),
    *(("finished", value, "finished") for value in (5, "yesterday", "2026-01-01T00:00:00")),
    ("started", "2026", "started"),
    ("process", 1.5, "process"),
    ("process", True, "process"),
    ("status", None, "status"),
    ("status", [], "status"),
    ("sweep", {"id": "s", "job": "first"}, "sweep.job"),
    ("sweep", {"id": 5, "job": 0}, "sweep.id"),
    ("sweep", {"id": "s", "job": 0, "settings": 5}, "sweep.settings"),
    ("sweep", [], "sweep"),
    ("error", "it broke", "error"),
    ("error", {"type": "E"}, "error.message is missing"),
    ("error", {"message": None}, "error.message"),
    ("metrics", {"compressed": None}, "metrics.compressed"),
    ("metrics", {"compressed": {"ppl/text": None}}, "metrics.compressed.ppl/text"),
    ("metrics", {"compressed": {"ppl/text": 1e308}}, "metrics.compressed.ppl/text is beyond 1e+250"),
    ("metrics", {"compressed": {"ppl/text": 10**400}}, "metrics.compressed.ppl/text is beyond 1e+250"),
    ("size", {"bytes": "many"}, "size.bytes"),
    ("objective", "small", "objective"),
    ("objective", {"ppl/text": None}, "objective.ppl/text"),
    ("timings", {"load": "long"}, "timings.load"),
    ("memory", {"process_bytes": "many"}, "memory.process_bytes"),
    ("cache", {"hits": 5}, "cache.hits"),
    ("cache", {"hits": {"gram": -1}}, "cache.hits.gram"),
    ("provenance", {"model": None}, "provenance.model"),
    ("versions", {"torch": 2.1}, "versions.torch"),
    ("source", {"commit": 5}, "source.commit"),
    ("hardware", {"gpus": 5}, "hardware.gpus"),
    ("hardware", {"gpus": [None]}, "hardware.gpus[0]"),
    ("model_folder", 5, "model_folder"),
    ("update", _DEEP, "update is nested deeper than 100 levels"),
    ("config", {"model": {"name": "\ud800"}}, "config.model.name holds half of a surrogate pair"),
    ("config", {"\ud800": 1}, "config has an entry called '\\ud800'"),
    ("plan", [], "plan"),
    ("plan", {"requested_ratio": 0.5}, "plan.groups is missing"),
    ("plan", {"requested_ratio": 0.5, "groups": []}, "plan.groups"),
    ("plan", {"requested_ratio": None, "groups": [GROUP]}, "plan.requested_ratio"),
    *(
        ("plan", {"requested_ratio": 0.5, "groups": [{**GROUP, key: value}]}, f"plan.groups[0].{key}")
        for key, values in {
            "matrix": (None, 5),
            "layers": (None, 5, [], ["0"], [-1], [[0]], [[0, 1, 2]], [[0, -1]], [[20_000, 0]], [[0, 70_000]]),
            "d_in": (None, 0, "4"),
            "rank": ("5", 1.5, -1),
            "parameters": (None, -1),
            "predicted_loss": (None, "small"),
            "loss_unit": ("metres", 5),
            "correction": (None, -1),
        }.items()
        for value in values
    ),
]


@pytest.mark.parametrize(("field", "value", "complaint"), _WRONG)
def test_a_field_of_a_wrong_kind_is_named(tmp_path: Path, field: str, value: Any, complaint: str) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps({**_BARE, field: value}))
    with pytest.raises(RecordError) as caught:
        read_record(tmp_path)
    assert complaint in str(caught.value)
    assert str(tmp_path / FILE_NAME) in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("content", ["[" * 200_000, "\x00\x01", "", '{"process": ' + "9" * 5000 + "}"])
def test_what_json_cannot_hold_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(RecordError, match="is not JSON"):
        read_record(tmp_path)


def test_every_field_has_a_check() -> None:
    for field in fields(RunRecord):
        with pytest.raises(RecordError, match=field.name):
            RunRecord.from_dict({**_BARE, field.name: object()})


def test_a_name_that_is_no_unicode_is_written_and_read(tmp_path: Path) -> None:
    """As the operating system hands over arguments whose bytes are no UTF-8."""
    write_record(replace(_record(tmp_path), command=("python", "name=\udcff")), tmp_path)
    assert read_record(tmp_path).command == ("python", "name=\\udcff")


def test_the_plan_of_a_record_is_a_plan(tmp_path: Path) -> None:
    shared = PlannedGroup(WeightGroup("q", (0, 2), 8, 4, correction=1), 3, 60, 0.5, 1e-6, 0.1, LossUnit.NATS)
    dense = PlannedGroup(WeightGroup("up", (1,), 4, 4), None, 16, 0.0, 0.0)
    plan = RankPlan((shared, dense), 0.75, "pivoted", {"trials": 3})
    made = RankPlan.from_dict(plan.to_dict())
    assert made == plan and made.to_dict() == plan.to_dict()
    write_record(replace(_record(tmp_path), plan={**plan.to_dict(), "rounds": [0.9, 0.75]}), tmp_path)
    assert read_record(tmp_path).rank_plan == plan
    assert _record(tmp_path).rank_plan is None
    with pytest.raises(RecordError, match="groups"):
        RankPlan.from_dict({})


def test_missing_record_says_where(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=str(tmp_path)):
        read_record(tmp_path)


def test_failed_write_leaves_the_old_record_whole(tmp_path: Path) -> None:
    old = _record(tmp_path)
    write_record(old, tmp_path)
    with pytest.raises(TypeError):
        write_record(replace(old, size={"bytes": object()}), tmp_path)
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


def _flips(content: bytes) -> list[bytes]:
    """The content with one bit changed, for every seventh bit of it."""
    return [
        content[: i // 8] + bytes([content[i // 8] ^ 1 << i % 8]) + content[i // 8 + 1 :]
        for i in range(0, 8 * len(content), 7)
    ]


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    small = replace(
        _record(tmp_path), command=(), versions={}, hardware={}, source=None, metrics={"dense": {"ppl/a": 3.5}}
    )
    path = write_record(small, tmp_path)
    content = path.read_bytes()
    noticed = 0
    for flipped in _flips(content):
        path.write_bytes(flipped)
        try:
            assert read_record(path) == small
        except RecordError as error:
            noticed += 1
            assert str(path) in str(error)
    assert noticed > len(content)  # of 8 / 7 flips per byte; blanks do not count


def test_an_edit_by_hand_is_explained_and_can_be_kept(tmp_path: Path) -> None:
    path = write_record(replace(_record(tmp_path), objective=12.5), tmp_path)
    text = path.read_text().replace('"objective": 12.5', '"objective": 11.5')
    path.write_text(text)
    with pytest.raises(RecordError, match=r'(?s)record\.json.*does not fit its checksum.*removes its line "checksum"'):
        read_record(path)
    *lines, last, end = text.splitlines()
    assert last.lstrip().startswith('"checksum"')
    path.write_text("\n".join([*lines[:-1], lines[-1].removesuffix(","), end]))
    assert read_record(path).objective == 11.5


def test_records_without_a_checksum_are_read(tmp_path: Path) -> None:
    record = _record(tmp_path)
    (tmp_path / FILE_NAME).write_text(json.dumps(record.to_dict()))
    assert read_record(tmp_path) == record


def test_order_and_blanks_do_not_count(tmp_path: Path) -> None:
    record = _record(tmp_path)
    data = json.loads(write_record(record, tmp_path).read_text())
    (tmp_path / FILE_NAME).write_text(json.dumps(dict(reversed(data.items())), indent=7))
    assert read_record(tmp_path) == record
