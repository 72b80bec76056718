"""What a run says of its texts: that they are the demo's, or the same twice; and windows that fit the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bs_exp.corpora.fitting import fitted
from bs_exp.corpora.given_texts import GivenTexts
from bs_exp.corpora.windows import max_positions
from bs_exp.evaluation.perplexity import Perplexity
from bs_exp.evaluation.similarity import Similarity
from bs_exp.models.tiny import tiny_random
from bs_exp.progress import WARNING
from bs_exp.records.record import read_record

Cli = Callable[..., Any]
Tiny = tuple[str, ...]
_CORPORA = {"mine": GivenTexts(texts=["a text"])}


def _perplexity(length: int, stride: int | None = None) -> Perplexity:
    return Perplexity(
        corpora=_CORPORA, sequence_length=length, stride=stride, tail="drop", average="tokens", max_windows=None,
        batch_size=1, special_tokens=False,
    )  # fmt: skip


@pytest.mark.parametrize("stride", [None, 100, 900])
def test_windows_are_as_long_as_the_context_at_most(stride: int | None) -> None:
    model = tiny_random()
    limit = max_positions(model)
    assert limit == 512
    found = fitted(_perplexity(1000, stride), model)
    assert found == _perplexity(512, None if stride is None else min(stride, 512))
    found.check(model)
    fits = _perplexity(512)
    assert fitted(fits, model) is fits
    assert fitted(_CORPORA, model) is _CORPORA  # windows of no fixed length


def test_an_encoder_decoder_has_room_for_both_parts() -> None:
    settings: dict[str, Any] = {"max_windows": None, "batch_size": 1, "special_tokens": False, "seed": 0}
    asked = Similarity(
        corpora=_CORPORA, sequence_length=2000, target="continuation", source_share=0.5, mask_share=0.15, **settings
    )
    model = tiny_random("bart")
    found = fitted(asked, model)
    assert max_positions(model) is not None and found.sequence_length == 2 * (max_positions(model) or 0)
    found.check(model)


def test_the_record_says_the_length_used(cli: Cli, tiny: Tiny, texts: Path) -> None:
    done = cli(*tiny, "calibration.sequence_length=4096", "evaluation.sequence_length=4096", "hydra.run.dir=out")
    assert done.status == 0, done.err
    record = read_record(Path("out"))
    assert record.provenance["calibration"]["sequence_length"] == 512
    assert record.provenance["evaluation_sequence_length"] == {"perplexity": 512}
    assert record.notes == (
        "evaluation (perplexity) windows of 512 tokens instead of 4,096: the model's context",
        "calibration windows of 512 tokens instead of 4,096: the model's context",
    )
    short = cli(*tiny, "calibration.sequence_length=512", "evaluation.sequence_length=512", "hydra.run.dir=short")
    assert short.status == 0 and read_record(Path("short")).metrics == record.metrics


def test_the_same_file_for_both_warns(cli: Cli, tiny: Tiny, texts: Path) -> None:
    Path("link.txt").symlink_to(texts / "A.txt")
    done = cli(*tiny, "evaluation.files=[link.txt]", "hydra.run.dir=out")
    assert done.status == 0, done.err
    [warning] = read_record(Path("out")).notes
    assert warning.startswith(f"{WARNING}text is evaluated on text that the model is calibrated on")
    assert "WARNING: text is evaluated" in done.err and "WARNING  text is evaluated" in done.out
    # What reads no calibration text cannot profit from it.
    plain = cli(*tiny, "evaluation.files=[link.txt]", "experiment=svd", "hydra.run.dir=plain")
    assert plain.status == 0 and "WARNING" not in plain.err
    assert not read_record(Path("plain")).notes


def test_a_model_of_ones_own_without_data(cli: Cli, tiny: Tiny, texts: Path, tmp_path: Path) -> None:
    made = tiny_random()
    made.module.save_pretrained(tmp_path / "mine")
    made.tokenizer.save_pretrained(tmp_path / "mine")
    demo_text = ("calibration=python_docs", "calibration.num_sequences=4", "evaluation.max_windows=2", "tracking=none")
    done = cli("model=./mine", "evaluation=perplexity", *demo_text, "hydra.run.dir=out")
    assert done.status == 0, done.err
    assert "WARNING: this model is calibrated and evaluated on documentation of Python packages" in done.err
    assert "data=wikitext2, data=FILE or data=FOLDER" in done.err
    assert any(note.startswith(WARNING) for note in read_record(Path("out")).notes)
    own = cli(*tiny[1:], "model=./mine", "hydra.run.dir=own")
    assert own.status == 0 and "WARNING" not in own.err
