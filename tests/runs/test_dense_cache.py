"""What points share: computed once, and only as long as it is true."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from bs_exp.cache import Cache
from bs_exp.models.fingerprint import fingerprint
from bs_exp.models.tiny import TinyRandom
from bs_exp.records.record import RunRecord, read_record
from bs_exp.reporting.collect import collect
from bs_exp.reporting.cost import cost_tables, shared_costs
from bs_exp.reporting.study import arrange
from bs_exp.runs import experiment
from bs_exp.runs.dense_cache import OF_SWEEP, DenseStore
from bs_exp.types import CompressedModel, LoadedModel, TokenWindows

Cli = Callable[..., Any]
Tiny = tuple[str, ...]
PRESETS = (
    *("svd", "svd_llm", "basis_sharing", "asvd", "fwsvd", "drank", "dipsvd_local", "dipsvd_heuristic"),
    *("basis_sharing_refit", "best"),
)


def _records(sweep: Path) -> list[RunRecord]:
    records = [read_record(path) for path in sweep.glob("*/record.json")]
    return sorted(records, key=lambda record: record.sweep["job"])  # type: ignore[index]


@pytest.mark.slow
def test_seven_ratios_cost_hardly_more_than_one(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    done = cli(*tiny, "retain_ratio=0.9,0.8,0.7,0.6,0.5,0.4,0.3", "hydra.sweep.dir=sweep", "-m")
    assert done.status == 0, done.err
    first, *others = _records(tmp_path / "sweep")
    assert first.cache["misses"]["gram"] > 0
    assert first.cache["misses"]["decomposition"] == len(first.plan["groups"])  # type: ignore[index]
    assert "dense_metrics" not in first.provenance
    assert len(others) == 6
    for record in others:
        # Nothing is loaded, read, calibrated, decomposed or measured again.
        assert record.provenance["model"] == first.provenance["model"]
        assert record.provenance["model"]["loaded_by"] == first.run_id
        assert record.cache["misses"] == {}
        assert record.provenance["dense_metrics"] == {"perplexity": first.run_id}
        assert record.metrics["dense"] == first.metrics["dense"]
        assert not {"calibrate", "perplexity (dense)"} & record.timings.keys()
    assert OF_SWEEP.loaded_by is None  # nothing is kept after the sweep


@pytest.mark.slow
def test_the_report_says_what_seven_ratios_cost(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    """From the timings in the records. How long they may take is ``bs_exp.benchmarks.real_size``'s to measure."""
    done = cli(*tiny, "retain_ratio=0.9,0.8,0.7,0.6,0.5,0.4,0.3", "hydra.sweep.dir=sweep", "-m")
    assert done.status == 0, done.err
    compress = [record.timings["compress"] for record in _records(tmp_path / "sweep")]
    (section,) = arrange(collect([tmp_path / "sweep"])).sections
    (cost,) = shared_costs(section.series[0])
    assert (cost.points, cost.first.ratio) == (7, 0.9)
    assert cost.all_seconds >= sum(compress)
    assert cost.times == cost.all_seconds / cost.first_seconds
    (table,) = (table for table in cost_tables(section, "m1") if table.key == "m1-shared")
    assert [cell.text for cell in table.rows[0].cells[-2:]] == [f"{cost.times:.2f}", "nothing"]


@pytest.mark.slow
def test_no_method_leaves_a_trace_in_the_model(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    done = cli(*tiny, f"experiment={','.join(PRESETS)}", "retain_ratio=0.6", "hydra.sweep.dir=sweep", "-m")
    assert done.status == 0, done.err
    first, *others = _records(tmp_path / "sweep")
    # The store hands a model on only after it has proved it unchanged.
    assert {record.provenance["model"]["loaded_by"] for record in others} == {first.run_id}
    last = others[-1]
    assert cli(*tiny, "experiment=best", "retain_ratio=0.6", "hydra.run.dir=alone", "cache.dir=null").status == 0
    alone = read_record(tmp_path / "alone")
    assert last.metrics["compressed"] == alone.metrics["compressed"]
    assert last.plan == alone.plan


@pytest.mark.slow
def test_points_of_two_models_load_each_once(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    done = cli(*tiny, "model.seed=0,1", "retain_ratio=0.9,0.8", "hydra.sweep.dir=sweep", "-m")
    assert done.status == 0, done.err
    a, b, c, d = _records(tmp_path / "sweep")
    assert [r.provenance["model"]["loaded_by"] for r in (a, b, c, d)] == [a.run_id, a.run_id, c.run_id, c.run_id]
    assert a.metrics["dense"] != c.metrics["dense"]
    assert "dense_metrics" not in c.provenance


@pytest.mark.slow
def test_text_that_changes_during_a_sweep_is_measured_again(
    cli: Cli, tiny: Tiny, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text((texts / "B.txt").read_text())
    compress, calls = experiment.compress, 0

    def write_and_compress(*arguments: Any) -> CompressedModel:
        nonlocal calls
        calls += 1
        if calls == 2:  # before the second point's model is judged
            held_out.write_text((texts / "A.txt").read_text())
        return compress(*arguments)

    monkeypatch.setattr(experiment, "compress", write_and_compress)
    settings = [s for s in tiny if not s.startswith("evaluation.files")]
    done = cli(*settings, f"evaluation.files=[{held_out}]", "retain_ratio=0.9,0.8", "hydra.sweep.dir=sweep", "-m")
    assert done.status == 0, done.err
    first, second = _records(tmp_path / "sweep")
    assert calls == 2
    digest = "ppl_text_sha256/text"
    assert first.metrics["dense"][digest] == first.metrics["compressed"][digest]
    assert second.metrics["dense"][digest] == second.metrics["compressed"][digest] != first.metrics["dense"][digest]
    assert "dense_metrics" not in second.provenance
    assert [note for note in second.notes if "measured again" in note]


SOURCE = TinyRandom(family="llama", layers=2, seed=0)


def _change_weight(model: LoadedModel) -> None:
    with torch.no_grad():
        next(model.module.parameters()).view(-1)[0] += 1.0


def _change_data(model: LoadedModel) -> None:
    next(model.module.parameters()).data.view(-1)[0] += 1.0  # unseen by autograd's version counters


def _train(model: LoadedModel) -> None:
    model.module.train()


def _hook(model: LoadedModel) -> None:
    model.module.get_input_embeddings().register_forward_hook(lambda *_: None)


def _freeze(model: LoadedModel) -> None:
    next(model.module.parameters()).requires_grad_(False)


def _leave_gradient(model: LoadedModel) -> None:
    parameter = next(model.module.parameters())
    parameter.grad = torch.zeros_like(parameter)


@pytest.mark.parametrize("change", [_change_weight, _change_data, _train, _hook, _freeze, _leave_gradient])
def test_a_changed_model_is_not_used_again(change: Callable[[LoadedModel], None]) -> None:
    store = DenseStore()
    model = SOURCE.load()
    store.keep(SOURCE, model, "first")
    assert store.find(SOURCE) is model
    change(model)
    assert store.find(SOURCE) is None
    assert store.loaded_by is None


def test_another_model_replaces_the_first_one() -> None:
    store = DenseStore()
    store.keep(SOURCE, SOURCE.load(), "first")
    assert store.find(TinyRandom(family="llama", layers=2, seed=1)) is None
    assert store.loaded_by is None
    assert fingerprint(SOURCE.load().module) == SOURCE.load().fingerprint


@dataclass(frozen=True)
class _Evaluator:
    setting: int

    def evaluate(self, model: LoadedModel) -> Mapping[str, float | str]:
        return {"setting": float(self.setting)}


@dataclass
class _Calls:
    count: int = 0


@dataclass(frozen=True)
class _Calibration:
    seed: int
    calls: _Calls = field(compare=False)
    batch_size: int = 1

    def windows(self, tokenizer: object) -> TokenWindows:
        self.calls.count += 1
        return TokenWindows(ids=torch.zeros(1, 4, dtype=torch.long), provenance={"seed": self.seed})


def test_measurements_and_windows_are_known_by_their_settings() -> None:
    store, model, calls = DenseStore(), SOURCE.load(), _Calls()
    store.keep(SOURCE, model, "first")
    store.measured(_Evaluator(1), {"setting": 1.0}, "first")
    found = store.measurement(_Evaluator(1))
    assert found is not None and (found.metrics, found.run_id) == ({"setting": 1.0}, "first")
    assert store.measurement(_Evaluator(2)) is None
    for seed, cut in ((0, 1), (0, 1), (1, 2)):
        windows = store.windows(_Calibration(seed, calls), model.tokenizer, Cache(None))
        assert (windows.provenance["seed"], calls.count) == (seed, cut)
    store.forget()
    assert store.measurement(_Evaluator(1)) is None
    store.windows(_Calibration(0, calls), model.tokenizer, Cache(None))
    assert calls.count == 3
