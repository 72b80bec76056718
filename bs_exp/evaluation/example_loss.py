"""Perplexity of the tokens that a model's own task predicts: exp of the mean training loss of its examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bs_exp import processes
from bs_exp.corpora.evaluated import text_hash
from bs_exp.corpora.windows import check_fits
from bs_exp.evaluation.perplexity import perplexity_of
from bs_exp.evaluation.texts import TextSettings, tracked
from bs_exp.models.model_inputs import feeder
from bs_exp.models.outputs import logits_of
from bs_exp.records.metrics import NONFINITE, TEXT_SHA256, TOKENS, metric
from bs_exp.types import LoadedModel, TokenWindows


def example_perplexity(
    model: LoadedModel, settings: TextSettings, windows: Mapping[str, TokenWindows], kind: str
) -> dict[str, float | str]:
    """`KIND/NAME`: exp of the mean loss over all predicted tokens of a corpus, every token weighing the same.

    Also `KIND_tokens/NAME`, the number of these tokens, and `KIND_text_sha256/NAME`. Losses that are not finite
    make the perplexity `inf`; `KIND_nonfinite/NAME` then counts them.
    """
    metrics: dict[str, float | str] = {}
    reader = feeder(model, settings.feeding)
    for name, cut in windows.items():
        check_fits(replace(cut, feeding=settings.feeding), model)
        losses: list[Tensor] = []
        parts = cut.ids.split(settings.batch_size)
        batches = [reader.examples(ids.to(model.device)) for ids in processes.mine(parts)]
        outputs = logits_of(model, [examples.inputs for examples in batches])
        for examples, logits in tracked(zip(batches, outputs, strict=True), f"{kind} on {name}", total=len(batches)):
            with torch.inference_mode():
                losses.append(examples.loss(logits, reduction="none").double().cpu())
        found = torch.cat(processes.put_together(losses, len(parts)))
        metrics[metric(kind, name)] = perplexity_of(float(found.mean()))
        metrics[metric(kind, name, TOKENS)] = len(found)
        metrics[metric(kind, name, TEXT_SHA256)] = text_hash(cut)
        if nonfinite := int((~found.isfinite()).sum()):
            metrics[metric(kind, name, NONFINITE)] = nonfinite
    return metrics
