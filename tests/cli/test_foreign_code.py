"""Strategies, texts and models of others may change under their names: then a result is made again, and says why."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bs_exp.models.tiny import tiny_random
from bs_exp.records import inputs
from bs_exp.records.record import RunRecord, read_record

Cli = Callable[..., Any]
Sweep = Callable[..., str]
Tiny = tuple[str, ...]
# A bug: the Gram is of the channels in reverse.
BROKEN = """
from dataclasses import dataclass
from typing import ClassVar

from bs_exp.linalg.cholesky import cholesky_whitener
from bs_exp.types import LossUnit, Metric, Statistic
from my_helper import order


@dataclass(frozen=True, kw_only=True)
class GramWhitening:
    ridge: float

    needs: ClassVar = frozenset({Statistic.GRAM})

    def metric(self, statistics):
        whitener, ridge = cholesky_whitener(order(statistics.gram), ridge=self.ridge)
        return Metric(whitener=whitener, ridge=ridge, unit=LossUnit.OUTPUT_NORM)
"""
REVERSED, AS_IS = "def order(gram):\n    return gram.flip(0).flip(1)\n", "def order(gram):\n    return gram\n"


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A whitening of others, with an option file, in folders of their own."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_whitening.py").write_text(BROKEN, encoding="utf-8")
    (tmp_path / "code" / "my_helper.py").write_text(REVERSED, encoding="utf-8")
    (tmp_path / "conf" / "whitening").mkdir(parents=True)
    (tmp_path / "conf" / "whitening" / "mine.yaml").write_text(
        "_target_: my_whitening.GramWhitening\nridge: 1.0e-12\n", encoding="utf-8"
    )
    return tmp_path


@pytest.fixture
def sweep(cli: Cli, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sweep]:
    """Runs a sweep as a process of its own would: nothing is loaded or known from before. What it says on stderr."""
    monkeypatch.syspath_prepend(plugin / "code")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def forget() -> None:
        for module in ("my_whitening", "my_helper"):
            sys.modules.pop(module, None)
        importlib.invalidate_caches()
        inputs._stamps.clear()

    def run(*settings: str) -> str:
        forget()
        finished = cli("--config-dir", str(plugin / "conf"), *settings, "-m")
        assert finished.status == 0, finished.err
        return str(finished.err)

    yield run
    forget()


def _records(folder: Path) -> list[RunRecord]:
    found = [read_record(path) for path in (folder / "outputs" / "sweeps").glob("*/*/record.json")]
    return sorted(found, key=lambda record: (record.config["whitening"]["_target_"], record.started))


def test_an_edited_strategy_gets_no_old_results(sweep: Sweep, plugin: Path, tiny: Tiny) -> None:
    """Truth: the built-in of the same name and settings, with which the mended one shares no cache entry."""
    settings = [*tiny, "experiment=svd_llm", "whitening=gram,mine", "retain_ratio=0.5"]
    assert "run again" not in sweep(*settings)
    ours, broken = _records(plugin)
    assert broken.config["whitening"]["_target_"] == "my_whitening.GramWhitening"
    assert set(broken.provenance["code"]["my_whitening.GramWhitening"]) == {"my_whitening", "my_helper"}
    assert "code" not in ours.provenance
    assert broken.objective != ours.objective

    assert "run again" not in sweep(*settings)
    assert _records(plugin) == [ours, broken]

    (plugin / "code" / "my_helper.py").write_text(AS_IS, encoding="utf-8")
    told = sweep(*settings)
    assert told.count("code of my_whitening.GramWhitening changed since point ") == 1
    assert "it is run again" in told
    kept, old, mended = _records(plugin)
    assert (kept, old) == (ours, broken)
    assert mended.objective == ours.objective
    assert mended.cache["misses"]["decomposition"] == broken.cache["misses"]["decomposition"] > 0


def test_a_search_that_may_choose_edited_code_is_another(sweep: Sweep, plugin: Path, tiny: Tiny, cli: Cli) -> None:
    """Also if no trial has chosen it: points of other code do not compare."""
    more = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "experiment=svd_llm", "whitening=choice(gram,mine)"]
    settings = [*tiny, *more, f"hydra.sweep.dir={plugin}/search"]
    sweep(*settings)
    assert "1 of 1 trials done" in sweep(*settings)
    (plugin / "code" / "my_helper.py").write_text(AS_IS, encoding="utf-8")
    for module in ("my_whitening", "my_helper"):
        sys.modules.pop(module, None)
    done = cli("--config-dir", str(plugin / "conf"), *settings, "-m")
    assert done.status == 1 and "code of my_whitening.GramWhitening: " in done.err


def test_a_point_whose_text_or_model_changed_is_run_again(sweep: Sweep, plugin: Path, tiny: Tiny, texts: Path) -> None:
    """Under the same path, so that the configuration and its hash are the same."""
    text, model, dense = plugin / "a.txt", plugin / "model", tiny_random()
    text.write_text((texts / "A.txt").read_text(encoding="utf-8"), encoding="utf-8")
    dense.module.save_pretrained(model)
    dense.tokenizer.save_pretrained(model)
    settings = [*tiny, "model=local", f"model.path={model}", f"calibration.files=[{text}]", "experiment=svd_llm"]
    assert "run again" not in sweep(*settings)
    (first,) = _records(plugin)

    text.write_text((texts / "B.txt").read_text(encoding="utf-8"), encoding="utf-8")
    assert f"{text} changed since point" in sweep(*settings)
    (second,) = _records(plugin)

    with torch.no_grad():
        next(dense.module.parameters()).mul_(1.5)
    dense.module.save_pretrained(model)
    assert f"{model} changed since point" in sweep(*settings)
    (third,) = _records(plugin)

    assert "run again" not in sweep(*settings)
    assert _records(plugin) == [third]
    assert first.config_hash == second.config_hash == third.config_hash
    assert len({record.objective for record in (first, second, third)}) == 3
    assert first.provenance["calibration"]["sha256"] != second.provenance["calibration"]["sha256"]
    assert second.provenance["model"]["fingerprint"] != third.provenance["model"]["fingerprint"]
