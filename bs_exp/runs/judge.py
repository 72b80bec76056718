"""The dense and the compressed model of one run, judged by the same evaluators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bs_exp import processes
from bs_exp.cache import Cache
from bs_exp.corpora.fitting import fitted, told
from bs_exp.errors import BsExpError, ConfigError
from bs_exp.protocols import Evaluator, PairedEvaluator, ReadsWindows
from bs_exp.records.stages import BOTH, Stage, evaluation_stage
from bs_exp.runs.content_keys import content_read, evaluation_key
from bs_exp.runs.dense_cache import DenseStore, Measurement
from bs_exp.runs.recorder import Recorder
from bs_exp.runs.stored_values import EVALUATION, find_data, store_data
from bs_exp.runs.windows_at_hand import windows_at_hand
from bs_exp.types import LoadedModel


@dataclass(frozen=True, eq=False)
class Judge:
    """Runs the evaluators and records what each of them finds as it ends.

    What an earlier point of the sweep measured on the same dense model is taken from `store`, and what another process
    measured from `cache`.
    """

    evaluators: Mapping[str, Evaluator]
    store: DenseStore
    recorder: Recorder
    cache: Cache

    def fitted(self, dense: LoadedModel) -> Judge:
        """The same evaluators, with windows that the model has positions for; notes and the record say what changed."""
        evaluators = {name: fitted(evaluator, dense) for name, evaluator in self.evaluators.items()}
        lengths: dict[str, int] = {}
        for name, evaluator in evaluators.items():
            if evaluator is not (asked := self.evaluators[name]):
                lengths[name] = getattr(evaluator, "sequence_length")  # noqa: B009  not a part of the protocol
                self.recorder.progress.note(told(f"evaluation ({name})", asked, evaluator))
        if lengths:
            self.recorder.update(provenance={**self.recorder.record.provenance, "evaluation_sequence_length": lengths})
        return replace(self, evaluators=evaluators)

    @property
    def _paired(self) -> dict[str, PairedEvaluator]:
        return {name: found for name, found in self.evaluators.items() if isinstance(found, PairedEvaluator)}

    def check(self, dense: LoadedModel) -> None:
        """An error for an evaluator that does not fit the model, before the long work."""
        with self.recorder.progress.stage(Stage.CHECK_EVALUATION):
            for name, evaluator in self.evaluators.items():
                with _about(name):
                    evaluator.check(dense)

    def dense(self, model: LoadedModel) -> dict[str, Any]:
        """Metrics of the dense model by name; `provenance.dense_metrics` names the runs that measured them earlier."""
        metrics: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for name, evaluator in self.evaluators.items():
            if name in self._paired:
                continue
            found, content = self.store.measurement(evaluator), None
            if found is None:
                content = self._content(name, evaluator)
                key = evaluation_key(evaluator, content, model)
                found = processes.from_first(partial(self._find_dense, key, evaluator))
            if found is None:
                self._measure_dense(metrics, name, evaluator, model, content)
            else:
                origins[name] = found.run_id
                self.add(metrics, found.metrics, name, "dense")
        if origins:
            self.recorder.update(provenance={**self.recorder.record.provenance, "dense_metrics": origins})
        return metrics

    def promised(self, dense: LoadedModel) -> tuple[str, ...]:
        """Names of numbers that are not measured before there is a compressed model."""
        return tuple(name for evaluator in self._paired.values() for name in evaluator.compared(dense))

    def compressed(self, model: LoadedModel) -> dict[str, Any]:
        """Metrics of the compressed model by name; paired evaluators measure those of the dense one beside them.

        Dense metrics that were taken over from a run with other text, or on another device, are measured again.
        """
        assert model.original is not None
        metrics: dict[str, Any] = {}
        alone: dict[str, Any] = {}
        paired: dict[str, Mapping[str, Any]] = {}
        for name, evaluator in self.evaluators.items():
            if isinstance(evaluator, PairedEvaluator):
                with self.recorder.progress.stage(evaluation_stage(name, BOTH)), _about(name):
                    # Timings need the machine for themselves: the other processes wait.
                    paired[name], found = processes.from_first(partial(evaluator.compare, model.original, model))
                self.add(dict(self.recorder.record.metrics.get("dense", {})), paired[name], name, "dense")
            else:
                found = self._measure(name, evaluator, model, "compressed", self._content(name, evaluator))
                alone |= found
            self.add(metrics, found, name, "compressed")
        self._measure_again_if_changed(model.original, alone, paired)
        return metrics

    def add(self, metrics: dict[str, Any], found: Mapping[str, Any], name: str, label: str) -> None:
        """Adds what an evaluator found to the metrics of a model, to the record and to the tracker.

        Raises ConfigError if two evaluators report one metric.
        """
        if twice := sorted(metrics.keys() & found.keys()):
            raise ConfigError(f"Two evaluators report {twice[0]}, one of them {name}; name their corpora apart.")
        metrics.update(found)
        self.recorder.update(metrics={**self.recorder.record.metrics, label: dict(metrics)})
        self.recorder.log({f"{label}/{key}": value for key, value in found.items()})

    def _measure_again_if_changed(
        self, dense: LoadedModel, after: Mapping[str, Any], paired: Mapping[str, Mapping[str, Any]]
    ) -> None:
        record = self.recorder.record
        before = record.metrics.get("dense", {})
        # Texts say how numbers came about: a hash of the evaluation text, the device.
        changed = [name for name, value in after.items() if isinstance(value, str) and before.get(name) != value]
        if not record.provenance.get("dense_metrics") or not changed:
            return
        self.recorder.progress.note(f"{changed[0]} changed during the sweep: the dense model is measured again.")
        metrics: dict[str, Any] = {}
        for name, evaluator in self.evaluators.items():
            if name in paired:
                self.add(metrics, paired[name], name, "dense")
            else:
                self._measure_dense(metrics, name, evaluator, dense, self._content(name, evaluator))
        provenance = {key: value for key, value in record.provenance.items() if key != "dense_metrics"}
        self.recorder.update(provenance=provenance)

    def _measure_dense(
        self,
        metrics: dict[str, Any],
        name: str,
        evaluator: Evaluator,
        model: LoadedModel,
        content: Mapping[str, str] | None,
    ) -> None:
        fresh = self._measure(name, evaluator, model, "dense", content)
        self.store.measured(evaluator, fresh, self.recorder.record.run_id)
        self.add(metrics, fresh, name, "dense")

    def _content(self, name: str, evaluator: Evaluator) -> Mapping[str, str] | None:
        with self.recorder.progress.stage(Stage.CHECK_EVALUATION), _about(name):
            return content_read(evaluator)

    def _find_dense(self, key: str | None, evaluator: Evaluator) -> Measurement | None:
        """What another process measured on the same model, text and machine, by the same code."""
        data = None if key is None else find_data(self.cache, EVALUATION, key)
        if data is None:
            return None
        self.store.measured(evaluator, data["metrics"], data["run_id"])
        return Measurement(data["metrics"], data["run_id"])

    def _measure(
        self, name: str, evaluator: Evaluator, model: LoadedModel, label: str, content: Mapping[str, str] | None
    ) -> dict[str, Any]:
        """What an evaluator finds; dense metrics and windows are kept for others if `content` still holds."""
        key = evaluation_key(evaluator, content, model) if model.original is None else None
        at_hand = None
        with self.recorder.progress.stage(evaluation_stage(name, label)), _about(name):
            if isinstance(evaluator, ReadsWindows):
                at_hand = windows_at_hand(evaluator, content, model.tokenizer, self.store, self.cache)
                found = dict(evaluator.evaluate_windows(model, at_hand.windows))
            else:
                found = dict(evaluator.evaluate(model))
        cut = at_hand is not None and bool(at_hand.cut)
        keeps = processes.is_first() and (cut or key is not None)
        if keeps and self._content(name, evaluator) == content:  # nothing changed while it was read
            if at_hand is not None:
                at_hand.keep(self.store, self.cache)
            if key is not None:
                store_data(self.cache, EVALUATION, key, {"metrics": found, "run_id": self.recorder.record.run_id})
        return found


@contextmanager
def _about(name: str) -> Iterator[None]:
    try:
        yield
    except BsExpError as error:
        error.add_note(f"This is about the evaluation, its part {name!r} (evaluation=...).")
        raise
