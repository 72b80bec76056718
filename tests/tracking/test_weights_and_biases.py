"""What W&B is told of a run, read back from the file that it keeps offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bs_exp.errors import ConfigError, DataError
from bs_exp.progress import Progress
from bs_exp.records.record import Status, read_record
from bs_exp.reporting.report import PageOfRun
from bs_exp.runs.recorder import Recorder, new_record
from bs_exp.tracking.weights_and_biases import WandbTracker
from tests.support.offline_file import OfflineRun, read_offline

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "project": "tests", "entity": None, "group": None, "tags": ["mine"], "mode": "offline", "log_model": False,
    "log_report": False, "report": PageOfRun(), "timeout": 30.0, "finish_timeout": 30.0,
}  # fmt: skip
GROUP = {"d_in": 32, "d_out": 16, "parameters": 10, "predicted_loss": 0.5, "loss_unit": "output_norm", "ridge": 0.0}
PLAN = {
    "requested_ratio": 0.8,
    "groups": [
        {"matrix": "q", "layers": [2], "rank": None, **GROUP},
        {"matrix": "q", "layers": [0, 1], "rank": 5, **GROUP},
        {"matrix": "up", "layers": [0, 1, 2], "rank": 7, **GROUP},
    ],
}
UPDATE = {
    "strategy": "lora",
    "steps": 4,
    "held_out_loss": [[0, 3.5], [2, 3.25], [4, 3.0]],
    "first": {"held_out_error": [[0, 1], [4, 0.5]], "shares": [[0.5, 0.5]]},
}


def recorder(folder: Path, save_model: bool = False, sweep: dict[str, Any] | None = None) -> Recorder:
    record = new_record(
        name="svd_llm",
        config={"retain_ratio": 0.8, "save_model": save_model},
        config_hash="ab" * 32,
        folder=folder,
        choices={"experiment": "svd_llm", "whitening": "gram"},
        sweep=sweep,
    )
    return Recorder(record, folder, Progress(quiet=True))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[OfflineRun, Recorder]:
    """A run of a sweep with everything that a run can have."""
    folder = tmp_path_factory.mktemp("sweep") / "svd_llm@0.8+group_size-2-abababababab"
    sweep = {"id": "fig_ratio", "job": 3, "settings": ["retain_ratio=0.8", "sharing.group_size=2", "model=demo"]}
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    with recorder(folder, save_model=True, sweep=sweep) as made:
        made.track(WandbTracker(**{**SETTINGS, "log_model": True, "log_report": True}))
        with made.progress.stage("load"):
            pass
        made.log({"dense/ppl/text": 10.5})
        how = {"throughput/device": "cpu", "throughput/batch_size": 8, "ppl_tokens/text": 252, "items/task": 9}
        compressed = {"ppl/text": 12.25, "throughput/decode_tok_s": 100.0, **how}
        made.log({f"compressed/{name}": value for name, value in compressed.items()})
        made.update(metrics={"dense": {"ppl/text": 10.5}, "compressed": compressed})
        made.update(plan=PLAN, update=UPDATE, size={"retain_ratio": 0.75}, model_folder="model", objective=12.25)
    return read_offline(folder), made


def history(found: OfflineRun, name: str) -> list[Any]:
    return [row[name] for row in found.history if name in row]


def test_identity(finished: tuple[OfflineRun, Recorder]) -> None:
    found, made = finished
    assert made.record.notes == ()
    assert (found.run.run_id, found.run.run_group) == (made.record.run_id, "fig_ratio")
    assert found.run.display_name == "svd_llm@0.8 group_size-2"
    assert sorted(found.run.tags) == ["mine", "svd_llm"]
    assert found.config["options"] == {"experiment": "svd_llm", "whitening": "gram"}
    assert found.config["retain_ratio"] == 0.8
    assert found.exit_code == 0


def test_metrics_timings_and_sizes(finished: tuple[OfflineRun, Recorder]) -> None:
    found, made = finished
    assert history(found, "dense/ppl/text") == [10.5]
    assert history(found, "compressed/ppl/text") == [12.25]
    assert history(found, "compressed/throughput/decode_tok_s") == [100.0]
    assert found.summary["ppl_ratio/text"] == 12.25 / 10.5
    assert found.summary["timings/load"] == made.record.timings["load"]
    assert found.summary["size/retain_ratio"] == 0.75
    assert (found.summary["objective"], found.summary["status"]) == (12.25, "completed")


def test_settings_are_no_charts(finished: tuple[OfflineRun, Recorder]) -> None:
    found, _ = finished
    for name in ("throughput/device", "throughput/batch_size", "ppl_tokens/text", "items/task"):
        assert history(found, f"compressed/{name}") == []
        assert f"compressed/{name}" in found.summary


def test_record_and_report_are_an_artifact_on_request(finished: tuple[OfflineRun, Recorder]) -> None:
    found, made = finished
    [artifact] = [artifact for artifact in found.artifacts if artifact.type == "report"]
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert files["record.json"] == made.folder / "record.json"
    assert files["report/index.html"] == made.folder / "report" / "index.html"
    assert "report/tables/runs.csv" in files
    assert "svd_llm" in files["report/index.html"].read_text()


def test_plan_is_a_table(finished: tuple[OfflineRun, Recorder]) -> None:
    found, made = finished
    [table] = history(found, "plan/path")
    [path] = made.folder.glob(f"wandb/offline-run-*/files/{table}")
    content = json.loads(path.read_text())
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    assert [(row["matrix"], row["layers"], row["rank"]) for row in rows] == [
        ("q", "[2]", None),
        ("q", "[0, 1]", 5),
        ("up", "[0, 1, 2]", 7),
    ]
    assert {row["loss_unit"] for row in rows} == {"output_norm"}


def test_rank_profile_is_a_plot(finished: tuple[OfflineRun, Recorder]) -> None:
    found, made = finished
    [table] = history(found, "rank_profile_table/path")
    [path] = made.folder.glob(f"wandb/offline-run-*/files/{table}")
    content = json.loads(path.read_text())
    points = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    lines = {(p["lineKey"], p["step"]): p["lineVal"] for p in points}
    # A dense matrix of 32 x 16 has rank 16.
    ranks = {"q": (5, 5, 16), "up": (7, 7, 7)}
    assert lines == {(matrix, layer): rank for matrix in ranks for layer, rank in enumerate(ranks[matrix])}
    assert "rank_profile" in str(found.config["_wandb/visualize/rank_profile"]), "what makes a chart of the table"


def test_curves_have_steps_of_their_own(finished: tuple[OfflineRun, Recorder]) -> None:
    found, _ = finished
    curve = [(r["update/step"], r["update/held_out_loss"]) for r in found.history if "update/held_out_loss" in r]
    assert curve == [(0, 3.5), (2, 3.25), (4, 3.0)]
    assert history(found, "update/first/held_out_error") == [1, 0.5]
    assert not any("shares" in name for row in found.history for name in row)
    assert found.metrics["update/*"].step_metric == "update/step"


def test_model_is_an_artifact_on_request(finished: tuple[OfflineRun, Recorder]) -> None:
    found, made = finished
    [artifact] = [artifact for artifact in found.artifacts if artifact.type == "model"]  # tables are artifacts too
    assert artifact.name == f"svd_llm-{made.record.run_id}"
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert files == {name: made.folder / "model" / name for name in ("config.json", "model.safetensors")}
    assert json.loads(artifact.metadata)["retain_ratio"] == 0.75


def test_a_run_outside_of_a_sweep_has_its_own_name(tmp_path: Path) -> None:
    with recorder(tmp_path) as made:
        made.track(WandbTracker(**SETTINGS))
    assert read_offline(tmp_path).run.display_name == "svd_llm@0.8"


def test_failed_run_is_closed_as_failed(tmp_path: Path) -> None:
    with pytest.raises(DataError), recorder(tmp_path) as made:
        made.track(WandbTracker(**SETTINGS))
        raise DataError("too short")
    found = read_offline(tmp_path)
    assert found.exit_code == 1
    assert (found.summary["status"], found.summary["error"]) == ("failed", "too short")
    assert found.artifacts == []


def test_model_that_nobody_saves_cannot_be_logged(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs save_model=true"):
        WandbTracker(**{**SETTINGS, "log_model": True}).start(recorder(tmp_path).record.to_dict(), tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mode": "sometimes"}, "mode must be one of auto, online, offline, disabled, got 'sometimes'"),
        ({"timeout": 0.0}, "timeout must be above 0 seconds"),
        ({"finish_timeout": -1.0}, "finish_timeout must be above 0 seconds"),
        ({"tags": ["x" * 65]}, "tags must be texts of 1 to 64 characters"),
    ],
)
def test_wrong_setting(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WandbTracker(**{**SETTINGS, **setting})


def test_mode_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = WandbTracker(**{**SETTINGS, "mode": "auto"})
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracker._mode() is None
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert tracker._mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert tracker._mode() == "online"


@pytest.mark.parametrize("mode", ["disabled"])
def test_disabled_mode_takes_everything_and_writes_nothing(tmp_path: Path, mode: str) -> None:
    with recorder(tmp_path) as made:
        made.track(WandbTracker(**{**SETTINGS, "mode": mode}))
        made.log({"ppl": 1.0})
        made.update(plan=PLAN, update=UPDATE)
    assert made.record.notes == ()
    assert not list(tmp_path.glob("wandb/*"))


@pytest.mark.slow
def test_run_outlives_the_service(tmp_path: Path) -> None:
    """The service that W&B starts beside the run is killed in the middle, as the kernel does when memory is short."""
    program = """
import sys, psutil, time
from pathlib import Path
from tests.tracking.test_weights_and_biases import PLAN, SETTINGS, WandbTracker, recorder
with recorder(Path(sys.argv[1])) as made:
    made.track(WandbTracker(**SETTINGS))
    made.log({"before": 1.0})
    for child in psutil.Process().children(recursive=True):
        child.kill()
        child.wait()
    deadline = time.monotonic() + 20
    while not made.record.notes and time.monotonic() < deadline:  # noticed with the first or second message
        made.log({"after": 1.0})
        made.update()
    made.update(plan=PLAN)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        # A service that this very process has started would be shared.
        env={k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"} | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    record = read_record(tmp_path)
    assert record.status == Status.COMPLETED
    [note] = record.notes
    assert "W&B could not log" in note and "goes on without tracking" in note


@pytest.mark.slow
def test_same_run_started_again_goes_on_in_the_same_run(
    cli: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path
) -> None:
    tracked = [*tiny, "tracking=wandb", "hydra.run.dir=out"]
    assert cli(*tracked).status == 0
    first = read_record(tmp_path / "out")
    assert cli(*tracked).status == 0
    assert read_record(tmp_path / "out").run_id == first.run_id
    runs = {path.name.split("-", 3)[3] for path in (tmp_path / "out").glob("wandb/offline-run-*")}
    assert runs == {first.run_id}
