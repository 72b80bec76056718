"""Names of the stages of a run, as `timings` in its record and its error have them."""

from __future__ import annotations

from enum import StrEnum


class Stage(StrEnum):
    """A stage with a name of its own; evaluators and candidates have one each, made by the functions below."""

    CONFIGURE = "configure"
    ESTIMATE = "estimate"
    LOAD = "load"
    CHECK_EVALUATION = "check evaluation"
    GROUP = "group"
    TOKENISE = "tokenise"
    CHECK_CANDIDATES = "check candidates"
    COMPRESS = "compress"  # holds the stages of COMPRESSION, and what happens between them
    SELECT = "select"
    PROFILE = "profile"
    CALIBRATE = "calibrate"
    DECOMPOSE = "decompose"
    ALLOCATE = "allocate"
    REPLACE = "replace"
    UPDATE = "update"
    QUANTISE = "quantise"
    SAMPLE = "write samples"
    SAVE = "save"
    ANALYSE = "analyse"


# Usually done before compression begins, though a part of it.
BEFORE_COMPRESSION = (Stage.TOKENISE, Stage.GROUP)
# Stages that compressing takes. Loading, evaluating and saving are paid for a dense model too.
COMPRESSION = (
    *BEFORE_COMPRESSION,
    Stage.PROFILE,
    Stage.CALIBRATE,
    Stage.DECOMPOSE,
    Stage.ALLOCATE,
    Stage.REPLACE,
    Stage.UPDATE,
    Stage.QUANTISE,
)


BOTH = "both"


def evaluation_stage(evaluator: str, model: str) -> str:
    """What an evaluator takes on the `dense` or the `compressed` model, or on `both` together."""
    return f"{evaluator} ({model})"


def evaluated_model(stage: str) -> str | None:
    """`dense`, `compressed` or `both` if the stage evaluates models, else None."""
    return next((model for model in ("dense", "compressed", BOTH) if stage.endswith(f" ({model})")), None)


def candidate_stage(candidate: str) -> str:
    """What a candidate of a selection takes."""
    return f"candidate {candidate}"
