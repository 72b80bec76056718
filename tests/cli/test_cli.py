"""What a user meets when something is wrong, or stops a run: a message, an exit status, and a record that says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bs_exp.cli.explain import explain
from bs_exp.records.record import RecordError, RunRecord, Status, read_record

Cli = Callable[..., Any]
Tiny = tuple[str, ...]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        ("sed=1", "error: sed does not exist. Did you mean seed?"),
        (
            "calibration.num_sequence=3",
            "error: calibration.num_sequence does not exist in calibration=text. Did you mean num_sequences?",
        ),
        ("experiment=svd sharing.size=3", "error: sharing.size does not exist in sharing=none. Keys there: none."),
        ("model=dmo", "error: model=dmo does not exist. Did you mean demo?"),
        ("experiment=best_without/step", "error: experiment/best_without=step does not exist. Did you mean steps?"),
        ("seed=abc", "error: seed must be a whole number, got 'abc'."),
        (
            "retain_ratio=80%",
            "error: retain_ratio must be a number, got '80%'. Shares are parts of one: retain_ratio=0.8.",
        ),
        ("objective=acc/none", "error: objective must be one of ppl/text, size/retain_ratio,"),
        ("objective=[ppl/text,size/weight]", "error: objective must be one of ppl/text, size/retain_ratio,"),
    ],
)
def test_typo_stops_before_any_work(cli: Cli, tiny: Tiny, tmp_path: Path, slip: str, message: str) -> None:
    done = cli(*tiny, *slip.split(), "hydra.run.dir=out")
    assert done.status == 1
    assert done.err.startswith(message)
    assert "Traceback" not in done.err
    assert done.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("slip", "message", "stage"),
    [
        ("sharing.group_size=0", "error: sharing.group_size must be", "configure"),
        ("sharing.group_size=9", "error: ", None),
        ("evaluation.files=[absent.txt]", "error: ", "perplexity (dense)"),
        ("calibration.num_sequences=100000", "error: ", "tokenise"),
    ],
)
def test_bad_setting_leaves_a_record(
    cli: Cli, tiny: Tiny, tmp_path: Path, slip: str, message: str, stage: str | None
) -> None:
    done = cli(*tiny, *slip.split(), "hydra.run.dir=out")
    assert done.status == 1
    # Lines before it tell of stages that went well.
    assert [line for line in done.err.splitlines() if line.startswith(message)]
    assert "Traceback" not in done.err
    assert "Error executing job" not in done.err
    assert f"Recorded in {tmp_path}/out/record.json" in done.err
    record = read_record(tmp_path / "out")
    assert record.status == Status.FAILED
    assert record.finished is not None
    assert record.error is not None
    assert stage is None or record.error["stage"] == stage
    assert "Traceback" in record.error["traceback"]


@pytest.mark.parametrize("name", ["../../x", "/abs", "a/b", ".hidden", "a\\\\b", "x" * 300])
def test_a_name_that_leaves_its_folder_is_refused_at_once(cli: Cli, tiny: Tiny, tmp_path: Path, name: str) -> None:
    done = cli(*tiny, f"name='{name}'")
    assert done.status == 1
    assert done.err.startswith("error: name must be a plain name") and len(done.err.splitlines()) == 1
    assert "hydra.run.dir=DIR" in done.err
    assert not list(tmp_path.iterdir())


def test_a_name_that_leaves_its_folder_is_refused_in_a_sweep(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    done = cli(*tiny, "name='../../x'", "retain_ratio=0.5,0.6", "-m")
    assert done.status == 1
    assert "error: name must be a plain name" in done.err
    assert not list(tmp_path.iterdir())


def test_escape_codes_of_settings_do_not_reach_the_terminal(cli: Cli, tiny: Tiny) -> None:
    done = cli(*tiny, "calibration.files=['a\x1b[2J\x07.txt']", "hydra.run.dir=out")
    assert done.status == 1
    assert "\\x1b[2J\\x07" in done.err and not set(done.out + done.err) & set("\x1b\x07")


def test_a_full_disk_names_the_file_that_was_open() -> None:
    # As in Hydra's own writes.
    with pytest.raises(OSError, match="No space left") as caught, open("/dev/full", "w", encoding="utf-8") as file:
        file.write("x" * 100_000)
    message = explain(caught.value)
    assert "the disk is full while writing /dev/full" in message and "hydra.run.dir=DIR" in message


def test_slip_is_answered_before_torch_is_imported(tmp_path: Path) -> None:
    program = "import sys; from bs_exp.__main__ import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program, "sharing.groupsize=2"],
        cwd=tmp_path,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "False\n")
    assert done.stderr.startswith("error: sharing.groupsize does not exist in sharing=paper.")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("evaluation.prompt_length=999999", "error: prompt_length 999999 and generated_length 32 add up to"),
        pytest.param("evaluation.tasks=[docs_clozed]", "error: tasks: 'docs_clozed' is none", marks=pytest.mark.slow),
    ],
)
def test_every_evaluator_is_asked_before_any_work(
    cli: Cli, tiny: Tiny, tmp_path: Path, setting: str, message: str
) -> None:
    done = cli(*(a for a in tiny if not a.startswith("evaluation")), "evaluation=full", setting, "hydra.run.dir=out")
    assert done.status == 1
    assert message in done.err
    record = read_record(tmp_path / "out")
    assert record.timings.keys() == {"configure", "load", "check evaluation"}
    assert record.metrics == {}


def test_place_that_cannot_be_written_says_what_to_do(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file in the way")
    done = cli(*tiny)
    assert done.status == 1
    assert done.err.startswith("error: cannot write outputs/")
    assert "hydra.run.dir=DIR" in done.err and "cache.dir=DIR" in done.err
    assert "Traceback" not in done.err


def test_occupied_model_folder_stops_before_any_work(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "thesis.txt").write_text("mine")
    done = cli(*tiny, "save_model=true", "hydra.run.dir=out")
    assert done.status == 1
    assert "out/model exists and is no model folder" in done.err
    assert "load" not in read_record(tmp_path / "out").timings
    assert (tmp_path / "out" / "model" / "thesis.txt").read_text() == "mine"


def test_damaged_cache_file_is_told(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    assert cli(*tiny, "cache.dir=cache", "hydra.run.dir=first").status == 0
    damaged = sorted((tmp_path / "cache" / "decomposition").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:-40])
    done = cli(*tiny, "cache.dir=cache", "hydra.run.dir=second")
    assert done.status == 0
    assert "note: damaged cache files were not used: 1 (decomposition)." in done.err
    first, second = (read_record(tmp_path / name) for name in ("first", "second"))
    assert first.objective == second.objective
    assert not any("damaged" in note for note in first.notes)


@pytest.mark.parametrize(("dial", "full_error"), [("debug=true", False), ("debug=false", True)])
def test_traceback_where_asked_for(cli: Cli, tiny: Tiny, dial: str, full_error: bool) -> None:
    done = cli(*tiny, "retain_ratio=0", dial, full_error=full_error)
    assert done.status == 1
    assert done.err.index("error: retain_ratio must be") < done.err.index("Traceback")


@pytest.mark.parametrize(("order", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_says_so(tiny: Tiny, texts: Path, tmp_path: Path, order: signal.Signals, status: int) -> None:
    text = (texts / "B.txt").read_text()
    (tmp_path / "long.txt").write_text(" ".join([text] * 100))
    command = [sys.executable, "-m", "bs_exp", *tiny, "evaluation.files=[long.txt]", "hydra.run.dir=out"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=_environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as run:
        _wait_for(lambda record: "model" in record.provenance, tmp_path / "out")
        run.send_signal(order)
        errors = run.communicate(timeout=60)[1]
    record = read_record(tmp_path / "out")
    assert record.status == Status.INTERRUPTED
    assert record.error is not None
    assert record.error["type"] == ("KeyboardInterrupt" if order == signal.SIGINT else "SystemExit")
    assert record.provenance["model"]
    assert "compressed" not in record.metrics
    assert run.returncode == status
    assert "Traceback" not in errors


def _wait_for(condition: Callable[[RunRecord], bool], folder: Path) -> None:
    end = time.monotonic() + 100
    while time.monotonic() < end:
        try:
            if condition(read_record(folder)):
                return
        except RecordError:
            pass  # not begun yet
        time.sleep(0.02)
    pytest.fail("the run never came that far")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}
