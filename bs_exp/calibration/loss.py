"""The loss of a model on calibration windows, and the windows that are drawn for one correction after another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from bs_exp import processes
from bs_exp.corpora.sampling import hold_out
from bs_exp.corpora.windows import part_of
from bs_exp.errors import ConfigError, DataError
from bs_exp.models.model_inputs import Examples, feeder
from bs_exp.models.outputs import logits_of
from bs_exp.types import CalibrationData, LoadedModel

# Logits that are kept: 256 MB in fp32.
_KEPT_NUMBERS = 2**26


def check_windows(
    update: str, *, windows: int | None, holdout: float, seed: int, data: CalibrationData, otherwise: str
) -> None:
    """ConfigError if a correction draws fewer windows than there are processes, DataError if fewer than these are left
    besides those that are held out (none with `holdout` 0); the message ends with what to do `otherwise`."""
    least, count = processes.count(), len(data.windows.ids)
    if windows is not None and windows < least:
        raise ConfigError(
            f"windows must be at least {least}, one for each process, got {windows}. Raise windows, or start fewer "
            "processes."
        )
    if not holdout:
        return
    if count < 2 or len(hold_out(count, holdout, seed)[0]) < least:
        raise DataError(
            f"update={update} needs at least 2 calibration windows, one of them held out, and with holdout={holdout:g} "
            f"as many that are not as there are processes ({least}), got {count}. Raise calibration.num_sequences, or "
            f"{otherwise}."
        )


def drawn(data: CalibrationData, windows: int | None, *, seed: int, number: int) -> CalibrationData:
    """So many windows, drawn by the seed and the number of the correction; all if there are no more, or with None."""
    if windows is None or windows >= len(data.windows.ids):
        return data
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    chosen = torch.randperm(len(data.windows.ids), generator=generator)[:windows].sort().values
    return replace(data, windows=part_of(data.windows, chosen, name=f"drawn for correction {number}"))


def shared_out(data: CalibrationData) -> CalibrationData:
    """The windows in batches that are small enough to leave one for every process."""
    share = len(data.windows.ids) // processes.count()
    return replace(data, batch_size=max(1, min(data.batch_size, share)))


class CalibrationLoss:
    """The loss of models on some windows, in nats per predicted token; 0 without any.

    That of the labels; where the data have a model `towards` which to go, the KL divergence from its predictions. Its
    logits are kept from one call to the next if they are few.
    """

    def __init__(self, dense: LoadedModel, data: CalibrationData, ids: Int[Tensor, "windows length"]) -> None:
        self._dense = dense
        self._data = data
        self._ids = ids
        self._kept: list[Tensor] | None = None

    def __call__(self, compressed: PreTrainedModel) -> float:
        return processes.from_first(lambda: self._measured(compressed)) if len(self._ids) else 0.0

    def _measured(self, compressed: PreTrainedModel) -> float:
        feed = feeder(self._dense, self._data.windows.feeding)
        examples = [feed.examples(part.to(self._dense.device)) for part in self._ids.split(self._data.batch_size)]
        found = logits_of(replace(self._dense, module=compressed), [each.inputs for each in examples])
        if self._data.towards is None:
            losses = (each.loss(logits, reduction="sum") for each, logits in zip(examples, found, strict=True))
        else:
            targets = self._targets(self._data.towards, examples)
            losses = (each.divergence(*pair) for each, *pair in zip(examples, found, targets, strict=True))
        predictions = len(self._ids) * feed.predictions(self._ids.shape[1])
        return sum(map(float, losses)) / predictions

    def _targets(self, towards: LoadedModel, examples: Sequence[Examples]) -> Iterable[Tensor]:
        if self._kept is not None:
            return self._kept
        found = logits_of(towards, [each.inputs for each in examples])
        positions = sum(each.labels.numel() for each in examples)
        vocabulary = int(getattr(towards.module.config, "vocab_size", _KEPT_NUMBERS))
        if positions * vocabulary > _KEPT_NUMBERS:
            return found
        self._kept = list(found)
        return self._kept
