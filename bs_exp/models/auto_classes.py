"""The Auto class that loads a checkpoint, and the task of its model, found from its configuration by a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from bs_exp.types import Task

# Model type -> names of classes, as Transformers keeps them.
ClassNames = Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class AutoClass:
    """An Auto class of Transformers and the task of its models; `classes` are their names by model type.

    `bare` are names of classes without a head whose checkpoints can be loaded with one, since its weights are those of
    the embeddings.
    """

    task: Task
    name: str
    classes: ClassNames
    bare: ClassNames = field(default_factory=dict)

    @property
    def loader(self) -> Any:
        """The Auto class itself, with `from_pretrained` and `from_config`."""
        return getattr(transformers, self.name)

    def fits(self, config: PreTrainedConfig) -> bool:
        """Whether the Auto class has a model for the type of this configuration."""
        return config.model_type in self.classes and (self.task is not Task.SEQ2SEQ_LM or config.is_encoder_decoder)

    def has(self, architectures: Sequence[str]) -> bool:
        """Whether it lists one of these classes, under any model type: some types use the class of another type."""
        names = {name for table in (self.classes, self.bare) for names in table.values() for name in _as_tuple(names)}
        return not names.isdisjoint(architectures)


def _only(classes: ClassNames, types: Mapping[str, Any]) -> ClassNames:
    return {model_type: names for model_type, names in classes.items() if model_type in types}


# The first that fits wins.
AUTO_CLASSES = (
    AutoClass(
        Task.SEQ2SEQ_LM,
        "AutoModelForSeq2SeqLM",
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        bare=_only(MODEL_MAPPING_NAMES, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ),
    AutoClass(Task.CAUSAL_LM, "AutoModelForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    AutoClass(Task.MASKED_LM, "AutoModelForMaskedLM", MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    AutoClass(Task.ENCODER, "AutoModelForTextEncoding", MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES),
    # Only types that also have a masked-token head: a headless model of another type is a decoder without its head.
    AutoClass(Task.ENCODER, "AutoModel", _only(MODEL_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES)),
)


def find_auto_class(config: PreTrainedConfig, *, own_code: bool) -> AutoClass | None:
    """The Auto class of a checkpoint, None if it is of no supported kind; `own_code` allows classes that it brings.

    The `architectures` of its configuration decide, since one model type can have several heads. Where none is named,
    an encoder-decoder is loaded as `SEQ2SEQ_LM`, an encoder as `MASKED_LM`, and everything else as `CAUSAL_LM`.
    """
    architectures = config.architectures or ()
    if own_code and (found := _of_own_code(config, architectures)) is not None:
        return found
    fitting = [auto for auto in AUTO_CLASSES if auto.fits(config)]
    if architectures:
        return next((auto for auto in fitting if auto.has(architectures)), None)
    if not config.is_encoder_decoder and not getattr(config, "is_decoder", False):
        fitting.sort(key=lambda auto: auto.task is not Task.MASKED_LM)
    return next(iter(fitting), None)


def _of_own_code(config: PreTrainedConfig, architectures: Sequence[str]) -> AutoClass | None:
    """The Auto class that the checkpoint's own code (`auto_map`) offers, preferably one that its architectures name."""
    served: Mapping[str, str] = getattr(config, "auto_map", None) or {}
    offered = [auto for auto in AUTO_CLASSES if auto.name in served]
    named = [auto for auto in offered if served[auto.name].rpartition(".")[2] in architectures]
    return next(iter([*named, *offered]), None)


def _as_tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
