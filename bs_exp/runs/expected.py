"""What a run is expected to take, estimated before its model is loaded, and what it took."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from bs_exp.cache import Cache
from bs_exp.corpora.fitting import fitted
from bs_exp.corpora.hub_dataset import HubDataset
from bs_exp.errors import ConfigError
from bs_exp.estimate.estimate import Estimate, Place, Windows, estimate
from bs_exp.estimate.traced import Traced
from bs_exp.models.loading import resolve_device
from bs_exp.pipeline import CutWindows, Recipe, cut_windows
from bs_exp.protocols import Calibration, Evaluator, ModelSource
from bs_exp.types import Activations, LoadedModel


@runtime_checkable
class HasShapes(Protocol):
    """A source of a model that knows its shapes without reading weights."""

    def shapes(self) -> LoadedModel:
        """The model on the meta device."""


# Whether the windows of a calibration are known without reading its text.
IsAtHand = Callable[[Calibration, PreTrainedTokenizerBase], bool]


def is_known_early(source: ModelSource, recipe: Recipe) -> bool:
    """Whether an estimate can be made before the model is loaded: by its shapes, and the number of windows."""
    counted = isinstance(getattr(recipe.calibration, "num_sequences", None), int)
    return isinstance(source, HasShapes) and (counted or not recipe.reads_windows)


def shapes_of(source: ModelSource) -> LoadedModel:
    """The model of a source on the meta device. ConfigError for a source that does not know its shapes."""
    if not isinstance(source, HasShapes):
        raise ConfigError(
            f"{type(source).__name__} has no method shapes(), which gives the model on the meta device: without it "
            "nothing is known before the model is loaded."
        )
    return source.shapes()


def expected_windows(
    shapes: LoadedModel,
    calibration: Calibration,
    cut: CutWindows = cut_windows,
    at_hand: IsAtHand = lambda calibration, tokenizer: False,
) -> Windows:
    """The windows of a calibration.

    They are cut only where settings do not say how many there are; no text is read where they are `at_hand`.
    Raises what settings raise that do not fit.
    """
    fitting: Any = fitted(calibration, shapes)
    waiting: Activations = getattr(fitting, "activations", "auto")
    count, length = getattr(fitting, "num_sequences", None), getattr(fitting, "sequence_length", None)
    known = at_hand(fitting, shapes.tokenizer)
    if not isinstance(count, int) or not isinstance(length, int):
        count, length = cut(fitting, shapes.tokenizer).ids.shape
    if known:
        return Windows(count, length, calibration.batch_size, waiting, 0)
    corpus = getattr(fitting, "corpus", None)
    # Texts of the hub are read when the run begins.
    characters = 0 if corpus is None or isinstance(corpus, HubDataset) else len(corpus.read()[0])
    return Windows(count, length, calibration.batch_size, waiting, characters)


def expected(
    shapes: LoadedModel,
    place: Place,
    recipe: Recipe,
    windows: Windows | None,
    evaluators: Iterable[Evaluator],
    cache: Cache,
    *,
    save_model: bool,
    held: int = 0,
    known: Traced | None = None,
) -> Estimate:
    """The estimate of a run on calibration windows.

    `held` are bytes of this process that the run will not need; `known` is what earlier estimates of the same model in
    the same place have traced. Raises what settings raise that do not fit.
    """
    tokens = _evaluation_tokens(shapes, evaluators)
    return estimate(
        shapes, recipe, windows, cache, place,
        save_model=save_model, evaluation_tokens=tokens, held=held, known=known,
    )  # fmt: skip


def place_of(source: ModelSource) -> Place:
    """Where the settings of a source put the model."""
    return Place(resolve_device(getattr(source, "device", "auto")), getattr(source, "offload", "none"))


def measured_cost(cache: Cache, record_size: Mapping[str, Any], memory: Mapping[str, Any]) -> dict[str, Any]:
    """What a run took, under the names of `Estimate.to_dict`."""
    saved = record_size.get("saved_bytes")
    disk = cache.made_bytes() if cache.folder is not None else {}
    return {
        "host_bytes": memory.get("process_bytes"),
        "device_bytes": memory.get("gpu_bytes") or 0,
        "disk_bytes": disk | ({} if saved is None else {"saved model": saved}),
    }


def _evaluation_tokens(shapes: LoadedModel, evaluators: Iterable[Evaluator]) -> tuple[int, int] | None:
    """The windows of the largest batch that is evaluated, and their length; None if no evaluator says so."""
    batches = []
    for evaluator in evaluators:
        given = fitted(evaluator, shapes)
        batch, length = getattr(given, "batch_size", None), getattr(given, "sequence_length", None)
        if isinstance(batch, int) and isinstance(length, int):
            batches.append((batch, length))
    return max(batches, key=lambda each: each[0] * each[1], default=None)
