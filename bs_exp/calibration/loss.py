"""The loss of a model on calibration windows, and the windows that are drawn for one correction after another."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from bs_exp import processes
from bs_exp.corpora.windows import part_of
from bs_exp.errors import ConfigError, DataError
from bs_exp.models.fingerprint import fingerprint
from bs_exp.models.model_inputs import feeder
from bs_exp.models.outputs import logits_of
from bs_exp.types import CalibrationData, LoadedModel


def check_windows(update: str, *, windows: int | None, holdout: float, data: CalibrationData) -> None:
    """ConfigError if a correction draws fewer windows than there are processes, DataError if none can be held out."""
    if windows is not None and windows < processes.count():
        raise ConfigError(
            f"windows must be at least {processes.count()}, one for each process, got {windows}. Raise "
            "windows, or start fewer processes."
        )
    if holdout and len(data.windows.ids) < 2:
        raise DataError(
            f"update={update} needs at least 2 calibration windows, one of them held out, got "
            f"{len(data.windows.ids)}. Raise calibration.num_sequences, or set holdout=0."
        )


def as_loaded(compressed: PreTrainedModel, dense: LoadedModel) -> LoadedModel:
    """The compressed model as it is now, for gathering statistics: known by its own fingerprint."""
    return replace(dense, module=compressed, provenance={**dense.provenance, "fingerprint": fingerprint(compressed)})


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


def calibration_loss(
    compressed: PreTrainedModel, dense: LoadedModel, data: CalibrationData, ids: Int[Tensor, "windows length"]
) -> float:
    """The loss of a model on windows, in nats per predicted token; 0 without any.

    That of the labels; where the data have a model `towards` which to go, the KL divergence from its predictions.
    """
    if not len(ids):
        return 0.0
    feed = feeder(dense, data.windows.feeding)

    def measured() -> float:
        examples = [feed.examples(part.to(dense.device)) for part in ids.split(data.batch_size)]
        inputs = [each.inputs for each in examples]
        found = logits_of(replace(dense, module=compressed), inputs)
        if data.towards is None:
            losses = (each.loss(logits, reduction="sum") for each, logits in zip(examples, found, strict=True))
        else:
            targets = logits_of(data.towards, inputs)
            losses = (each.divergence(*pair) for each, *pair in zip(examples, found, targets, strict=True))
        predictions = len(ids) * feed.predictions(ids.shape[1])
        return sum(map(float, losses)) / predictions

    return processes.from_first(measured)
