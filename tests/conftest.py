"""What all tests share: no accelerator, network or account is asked for, and every run works in a folder of its own."""

from __future__ import annotations

import os

# Before torch is imported: tests run beside each other, and tiny models gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["WANDB_MODE"] = "offline"

import gc
import logging
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

# Shells start background jobs deaf to Ctrl-C, and these would pass it on to the runs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_TEXT = "the model reads a text and learns which word may follow another in it so that no two lines are alike"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a CUDA device, tests that need one are skipped, whatever was selected."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """Modules are here to stay: runs collect garbage, and looking at them took a third of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `A.txt` and `B.txt`, about 3,000 different words each."""
    folder = tmp_path_factory.mktemp("texts")
    for seed, name in enumerate(("A.txt", "B.txt")):
        words = random.Random(seed).choices(_TEXT.split(), k=3000)
        (folder / name).write_text(" ".join(words), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny(texts: Path) -> tuple[str, ...]:
    """Settings of a run that takes about a second: a tiny random model on the two texts."""
    return (
        "model=tiny_random",
        "calibration=text",
        f"calibration.files=[{texts}/A.txt]",
        "calibration.num_sequences=all",
        "calibration.sequence_length=64",
        "calibration.order=sequential",
        "evaluation=text",
        f"evaluation.files=[{texts}/B.txt]",
        "evaluation.sequence_length=64",
        "tracking=none",
    )


@dataclass(frozen=True)
class Finished:
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Finished]]:
    """Runs the command line in this process, in a folder of its own; Hydra's traces in the process are removed."""
    from bs_exp.__main__ import main

    def run(*arguments: str, full_error: bool = False) -> Finished:
        monkeypatch.setattr(sys, "argv", ["bs_exp", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1" if full_error else "0")  # the command sets it
        capfd.readouterr()
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capfd.readouterr()
        return Finished(status, captured.out, captured.err)

    monkeypatch.chdir(tmp_path)
    root, terminate = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers, level = root.handlers[:], root.level
    yield run
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    signal.signal(signal.SIGTERM, terminate)
