"""The dense model and its metrics, shared by the points of a sweep that run in one process.

At most one model is kept. Its fingerprint is compared before it is used again. Windows come from the cache where
another process has cut them.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bs_exp.cache import Cache
from bs_exp.estimate.estimate import Place
from bs_exp.estimate.traced import Traced
from bs_exp.models.fingerprint import fingerprint
from bs_exp.protocols import Calibration, Evaluator, ModelSource
from bs_exp.runs.content_keys import windows_key
from bs_exp.runs.stored_values import EVALUATED, TOKENISATION, find_windows, store_windows
from bs_exp.types import LoadedModel, TokenWindows


@dataclass(frozen=True, eq=False)
class Measurement:
    """Metrics of the dense model, and the run that measured them."""

    metrics: Mapping[str, Any]
    run_id: str


@dataclass(frozen=True, eq=False)
class _Kept:
    source: ModelSource
    model: LoadedModel
    run_id: str
    switches: tuple[object, ...]


@dataclass(eq=False)
class DenseStore:
    """One dense model with its metrics and windows; a run with another model empties the store.

    Sources, evaluators and calibrations are compared by their settings.
    """

    loads: int = 0
    _kept: _Kept | None = None
    _measured: list[tuple[Evaluator, Measurement]] = field(default_factory=list)
    _windows: list[tuple[Calibration, TokenWindows]] = field(default_factory=list)
    _evaluated: dict[str, TokenWindows] = field(default_factory=dict)
    _traced: tuple[object, Traced] | None = None

    @property
    def held_bytes(self) -> int:
        """Bytes of the weights of the kept model."""
        return 0 if self._kept is None else sum(weight.nbytes for weight in self._kept.model.module.parameters())

    def find(self, source: ModelSource) -> LoadedModel | None:
        """The kept model, if it is the one that `source` describes and nothing in it has changed; else None.

        Another model is released first, so that two dense models are never in memory at once.
        """
        kept = self._kept
        if kept is not None and kept.source == source and _is_unchanged(kept):
            return kept.model
        self.forget()
        return None

    def keep(self, source: ModelSource, model: LoadedModel, run_id: str) -> None:
        """Stores a model that a run has just loaded."""
        self.loads += 1
        self._kept = _Kept(source, model, run_id, _switches(model.module))

    @property
    def loaded_by(self) -> str | None:
        """The run that loaded the kept model."""
        return self._kept.run_id if self._kept else None

    def measurement(self, evaluator: Evaluator) -> Measurement | None:
        """The metrics that an evaluator with these settings measured on the kept model; None if it did not."""
        return next((found for known, found in self._measured if known == evaluator), None)

    def measured(self, evaluator: Evaluator, metrics: Mapping[str, Any], run_id: str) -> None:
        """Stores the metrics of an evaluator for the kept model, in place of earlier ones."""
        self._measured = [(known, found) for known, found in self._measured if known != evaluator]
        self._measured.append((evaluator, Measurement(dict(metrics), run_id)))

    def windows(self, calibration: Calibration, tokenizer: PreTrainedTokenizerBase, cache: Cache) -> TokenWindows:
        """The windows of a calibration, cut at the first call and kept, in the cache for other processes too."""
        for known, windows in self._windows:
            if known == calibration:
                return windows
        windows = _kept_windows(calibration, tokenizer, cache)
        self._windows.append((calibration, windows))
        return windows

    def has_windows(self, calibration: Calibration, tokenizer: PreTrainedTokenizerBase, cache: Cache) -> bool:
        """Whether `windows` would read no text."""
        if any(known == calibration for known, _ in self._windows):
            return True
        key = windows_key(calibration, tokenizer)
        return key is not None and cache.holds(TOKENISATION, key)

    def evaluated_windows(self, key: str, cache: Cache) -> TokenWindows | None:
        """The evaluated windows under a key (`evaluated_windows_key`), kept here or in the cache; None if nowhere."""
        windows = self._evaluated.get(key) or find_windows(cache, EVALUATED, key)
        if windows is not None:
            self._evaluated[key] = windows
        return windows

    def keep_evaluated_windows(self, key: str, windows: TokenWindows, cache: Cache) -> None:
        """Keeps evaluated windows under their key, for other processes too."""
        self._evaluated[key] = windows
        store_windows(cache, EVALUATED, key, windows)

    def traced(self, source: ModelSource, place: Place) -> Traced:
        """What estimates have traced of a model in a place; of another one, nothing."""
        if self._traced is None or self._traced[0] != (source, place):
            self._traced = ((source, place), Traced())
        return self._traced[1]

    def forget(self) -> None:
        """Releases the model, its metrics and its windows."""
        self._kept = None
        self._measured.clear()
        self._windows.clear()
        self._evaluated.clear()
        # Modules hold reference cycles: without a collection, the next model would load beside this one.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# That of all points which a process runs in one sweep; `__main__` empties it at the end.
OF_SWEEP = DenseStore()


def _kept_windows(calibration: Calibration, tokenizer: PreTrainedTokenizerBase, cache: Cache) -> TokenWindows:
    key = windows_key(calibration, tokenizer)
    if key is None:
        return calibration.windows(tokenizer)
    windows = find_windows(cache, TOKENISATION, key)
    if windows is None:
        windows = calibration.windows(tokenizer)
        if windows_key(calibration, tokenizer) == key:  # the text did not change while it was read
            store_windows(cache, TOKENISATION, key, windows)
    return windows


def _is_unchanged(kept: _Kept) -> bool:
    module = kept.model.module
    return _switches(module) == kept.switches and fingerprint(module) == kept.model.fingerprint


def _switches(module: PreTrainedModel) -> tuple[object, ...]:
    """The state that changes a model's behaviour besides its weights: training modes, hooks, gradients and flags."""
    return (
        tuple(
            (name, type(part), part.training, len(part._forward_hooks), len(part._forward_pre_hooks))
            for name, part in module.named_modules()
        ),
        tuple((name, p.requires_grad, p.grad is None) for name, p in module.named_parameters()),
    )
