"""A model as the package `mteb` wants it, and pairs of sentences as one of its tasks. Imports `mteb`."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
import torch
from datasets import Dataset
from jaxtyping import Float
from mteb.abstasks import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from torch import Tensor

from bs_exp.errors import DataError
from bs_exp.evaluation.text_embeddings import embeddings_of, token_rows
from bs_exp.types import LoadedModel
from bs_exp.validation import shown

_COLUMNS = ("sentence1", "sentence2", "score")
# Fewer have no order to speak of.
_FEWEST = 3


@dataclass(frozen=True)
class Score:
    """The main score of a task, and of how many texts the embeddings were not finite: they counted as zero."""

    value: float
    nonfinite: int


def scored(task: Any, model: LoadedModel, *, length: int, batch_size: int) -> Score:
    """The main score of a task: the mean over its evaluated splits and languages; 0 where embeddings order nothing."""
    encoder = _Encoder(model, length)
    with warnings.catch_warnings():
        # The task was asked for by its name, as the benchmark and published numbers have it.
        warnings.filterwarnings("ignore", message=".*is superseded by")
        # Of a model whose embeddings are all the same.
        warnings.filterwarnings("ignore", message=".*input array is constant")
        found = mteb.evaluate(
            encoder,
            task,
            # A shared folder would take the same model under two compressions for one.
            cache=None,
            co2_tracker=False,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
            show_progress_bar=False,
        )
    value = float(found.task_results[0].get_score())
    return Score(value if math.isfinite(value) else 0.0, encoder.nonfinite)


class _Encoder:
    """Embeddings of texts, cut at `length` tokens, compared by their cosine."""

    def __init__(self, model: LoadedModel, length: int) -> None:
        self._model = model
        self._length = length
        self.nonfinite = 0

    @property
    def mteb_model_meta(self) -> ModelMeta:
        return ModelMeta.create_empty(overwrites={"name": "bs_exp/model", "revision": "memory"})

    def encode(self, inputs: Iterable[Mapping[str, list[str]]], **_: Any) -> Float[Any, "texts d"]:
        """Embeddings of all texts of the batches, as an array; zero where they are not finite."""
        rows = (token_rows(batch["text"], self._model, length=self._length) for batch in inputs)
        found = torch.cat([embeddings_of(batch, self._model) for batch in rows])
        finite = found.isfinite().all(-1, keepdim=True)
        self.nonfinite += int((~finite).sum())
        return found.where(finite, 0.0).numpy()

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Float[Tensor, "first second"]:
        return torch.as_tensor(embeddings1) @ torch.as_tensor(embeddings2).mT

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Float[Tensor, " pairs"]:
        return (torch.as_tensor(embeddings1) * torch.as_tensor(embeddings2)).sum(-1)


def own_pairs(name: str, file: Path) -> AbsTaskSTS:
    """Pairs of sentences with a score, as a task; DataError if the file does not hold such."""
    rows = _rows(name, file)
    described = TaskMetadata(
        name=name,
        description="Pairs of sentences of one's own.",
        dataset={"path": file.name, "revision": hashlib.sha256(file.read_bytes()).hexdigest()},
        type="STS",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="cosine_spearman",
        reference=None,
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation=None,
    )
    task = type("OwnPairs", (AbsTaskSTS,), {"metadata": described})()
    scores = [score for *_, score in rows]
    task.min_score, task.max_score = min(scores), max(scores)
    task.dataset = {"test": Dataset.from_dict(dict(zip(_COLUMNS, zip(*rows, strict=True), strict=True)))}
    task.data_loaded = True
    return task  # type: ignore[no-any-return]


def _rows(name: str, file: Path) -> list[tuple[str, str, float]]:
    """The pairs: both sentences, and the score."""
    try:
        # With or without the mark that some programs put in front of a text.
        read = _read(name, file, file.read_text(encoding="utf-8-sig"))
        rows = [_pair(number, row) for number, row in enumerate(read, start=1)]
    except (ValueError, csv.Error) as error:
        raise DataError(
            f"pairs.{name}: every row of {file.name} must have {', '.join(_COLUMNS)}, two texts and a number: {error}."
        ) from error
    scores = [score for *_, score in rows]
    if len(rows) < _FEWEST or not all(map(math.isfinite, scores)) or min(scores) == max(scores):
        raise DataError(
            f"pairs.{name}: {file.name} must have at least {_FEWEST} rows, with finite scores that are not all the "
            f"same, got {len(rows)} rows."
        )
    return rows


def _read(name: str, file: Path, text: str) -> list[Any]:
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if file.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    if file.suffix == ".tsv":  # quotation marks are the sentences' own
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE))
    raise DataError(f"pairs.{name} must be a .jsonl, .csv or .tsv file, got {file.name}.")


def _pair(number: int, row: Any) -> tuple[str, str, float]:
    """ValueError, with the number of the row, for one that is no pair."""
    if not isinstance(row, dict) or None in row or any(row.get(column) is None for column in _COLUMNS):
        found = f"the columns {', '.join(map(str, row))}" if isinstance(row, dict) else shown(row)
        raise ValueError(f"row {number} has {found}, with too few or too many values")
    first, second, score = (row[column] for column in _COLUMNS)
    if not (isinstance(first, str) and isinstance(second, str)) or isinstance(score, bool):
        raise ValueError(f"row {number} has {shown([first, second, score])}")
    try:
        return first, second, float(score)
    except (TypeError, ValueError) as error:
        raise ValueError(f"row {number} has the score {shown(score)}") from error
