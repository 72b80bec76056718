"""What must be said of the texts of a run before anybody believes its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from bs_exp.corpora.python_docs import PythonDocs
from bs_exp.corpora.text_part import TextPart
from bs_exp.models.loading import DemoModel
from bs_exp.models.tiny import TinyRandom
from bs_exp.pipeline import Recipe
from bs_exp.protocols import Evaluator, ModelSource
from bs_exp.types import LoadedModel

_HOW = "data=wikitext2, data=FILE or data=FOLDER"


def data_warnings(
    model: ModelSource | LoadedModel, recipe: Recipe, evaluators: Mapping[str, Evaluator]
) -> tuple[str, ...]:
    """For a model of the user's own that reads the demo's text, and for text that is calibrated on and evaluated."""
    calibrated = getattr(recipe.calibration, "corpus", None) if recipe.reads_windows else None
    evaluated = {
        name: corpus
        for evaluator in evaluators.values()
        for name, corpus in dict(getattr(evaluator, "corpora", None) or {}).items()
    }
    return tuple(chain(_of_the_demo(model, calibrated, evaluated), _in_both(calibrated, evaluated)))


def _of_the_demo(model: object, calibrated: object, evaluated: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(model, DemoModel | TinyRandom):
        return
    reads = [
        *(["calibrated"] if isinstance(calibrated, PythonDocs) else []),
        *(["evaluated"] if any(isinstance(corpus, PythonDocs) for corpus in evaluated.values()) else []),
    ]
    if reads == ["evaluated"]:
        yield (
            "this model is evaluated on documentation of Python packages, the demo's text, which evaluation=... brings "
            f"and which wins over data=. Leave evaluation= out to judge on the rest of your own text: {_HOW}."
        )
    elif reads:
        yield (
            f"this model is {' and '.join(reads)} on documentation of Python packages, the demo's text, as no data was "
            f"named. Name a text like those that the model is used for: {_HOW}."
        )


def _in_both(calibrated: object, evaluated: Mapping[str, Any]) -> Iterator[str]:
    for name, corpus in evaluated.items():
        if calibrated is not None and _overlap(calibrated, corpus):
            yield (
                f"{name} is evaluated on text that the model is calibrated on, so its figures are better than on new "
                "text. data=FILE splits a file into two parts that do not overlap."
            )


def _overlap(one: Any, other: Any) -> bool:
    """Whether two corpora read the same split or the same files; options choose the splits of python_docs."""
    if isinstance(one, PythonDocs):
        return False
    if isinstance(one, TextPart) and isinstance(other, TextPart) and one.part != other.part:
        return set(_paths(one)) != set(_paths(other)) and bool(_shared(one, other))
    return bool(one == other or _shared(one, other))


def _shared(one: Any, other: Any) -> set[Path]:
    return _paths(one) & _paths(other)


def _paths(corpus: Any) -> set[Path]:
    """The files of a corpus of local text, without links, and those inside its folders."""
    named = [Path(name).expanduser().resolve() for name in getattr(corpus, "files", ())]
    inside = (file for path in named if path.is_dir() for file in path.rglob("*"))
    return {path for path in chain(named, inside) if path.is_file()}
