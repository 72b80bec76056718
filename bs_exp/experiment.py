"""One run, from load to report."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from datasets.utils import logging as datasets_logging

from bs_exp import environment
from bs_exp.cache import Cache
from bs_exp.errors import BsExpError, ConfigError
from bs_exp.evaluation.size import measure_size
from bs_exp.pipeline import Recipe, compress, prepare
from bs_exp.protocols import Evaluator, ModelSource, Tracker
from bs_exp.recording import Recorder
from bs_exp.saving import save_model
from bs_exp.types import CompressedModel, LoadedModel

MODEL_FOLDER = "model"
_PERPLEXITY = "ppl/"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A model, a recipe, and how to judge the result. `run` does all of it once and leaves nothing behind in memory."""

    model: ModelSource
    recipe: Recipe
    evaluators: Mapping[str, Evaluator]
    tracker: Tracker
    cache: Cache
    seed: int
    objective: str | None
    save_model: bool

    def __post_init__(self) -> None:
        # NumPy's legacy generator takes 32 bits.
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be between 0 and {2**32 - 1}, got {self.seed}.")

    def run(self, recorder: Recorder) -> float | None:
        """The objective, for a sweeper; everything else goes into the record."""
        _quiet_libraries()
        transformers.set_seed(self.seed)
        environment.reset_peak_memory()
        recorder.track(self.tracker)
        try:
            return self._compare(recorder)
        finally:
            recorder.update(memory=environment.peak_memory(), cache=_counts(self.cache))
            _free_memory()

    def _compare(self, recorder: Recorder) -> float | None:
        dense = self._load(recorder)
        preparation = prepare(dense, self.recipe, recorder.journal)
        dense_metrics = self._evaluate(dense, "dense", recorder)
        objective = self._objective_name(dense_metrics)
        compressed = compress(dense, self.recipe, self.cache, recorder.journal, preparation)
        recorder.update(
            plan={**compressed.plan.to_dict(), "rounds": list(compressed.rounds)},
            update=dict(compressed.update),
            size=measure_size(dense, compressed, compressed.plan),
            provenance={**recorder.record.provenance, "calibration": dict(compressed.calibration)},
        )
        self._save(compressed, dense, recorder)
        metrics = self._evaluate(replace(dense, module=compressed.module), "compressed", recorder)
        if objective is None:
            return None
        value = float(metrics[objective])
        recorder.update(objective=value)
        return value

    def _load(self, recorder: Recorder) -> LoadedModel:
        with recorder.journal.stage("load"):
            dense = self.model.load()
        recorder.update(provenance={"model": dict(dense.provenance)})
        return dense

    def _evaluate(self, model: LoadedModel, label: str, recorder: Recorder) -> dict[str, Any]:
        """Metrics of all evaluators, recorded as each of them ends."""
        metrics: dict[str, Any] = {}
        for name, evaluator in self.evaluators.items():
            with recorder.journal.stage(f"{name} ({label})"):
                try:
                    found = evaluator.evaluate(model)
                except BsExpError as error:
                    error.add_note(f"This is about the evaluation, its part {name!r} (evaluation=...).")
                    raise
            if twice := sorted(metrics.keys() & found.keys()):
                raise ConfigError(f"Two evaluators report {twice[0]}, one of them {name}; name their corpora apart.")
            metrics.update(found)
            recorder.update(metrics={**recorder.record.metrics, label: dict(metrics)})
            recorder.log({f"{label}/{key}": value for key, value in found.items()})
        return metrics

    def _objective_name(self, metrics: Mapping[str, Any]) -> str | None:
        """The metric to return, checked on the dense model's before the work of compression begins."""
        if self.objective is None:
            return next((name for name in metrics if name.startswith(_PERPLEXITY)), None)
        if not isinstance(metrics.get(self.objective), int | float):
            numbers = [name for name, value in metrics.items() if isinstance(value, int | float)]
            raise ConfigError(f"objective must be one of {', '.join(numbers)}, got {self.objective!r}.")
        return self.objective

    def _save(self, compressed: CompressedModel, dense: LoadedModel, recorder: Recorder) -> None:
        if not self.save_model:
            return
        with recorder.journal.stage("save"):
            folder = save_model(compressed.module, dense.tokenizer, recorder.folder / MODEL_FOLDER)
        saved = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        recorder.update(size={**recorder.record.size, "saved_bytes": saved}, model_folder=MODEL_FOLDER)


def _quiet_libraries() -> None:
    """The journal tells what happens; the libraries' chatter and bars would break its lines."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets_logging.set_verbosity_error()


def _counts(cache: Cache) -> dict[str, dict[str, int]]:
    return {"hits": dict(cache.hits), "misses": dict(cache.misses), "damaged": dict(cache.damaged)}


def _free_memory() -> None:
    # Modules hold reference cycles: without a collection, the next run of a sweep would load beside this one's models.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
