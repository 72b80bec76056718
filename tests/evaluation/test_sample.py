"""What a model writes is what Transformers' greedy generation writes, and is recorded beside the dense model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bs_exp.errors import ConfigError
from bs_exp.evaluation.sample import TextSample
from bs_exp.models.loading import DemoModel
from bs_exp.records.record import read_record

PROMPT = "This function returns"


def test_it_is_greedy_generation() -> None:
    model = DemoModel(dtype="float32", device="cpu").load()
    sample = TextSample(prompt=PROMPT, tokens=12)
    inputs = model.tokenizer(PROMPT, return_tensors="pt")
    ids = model.module.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = model.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert sample.evaluate(model) == {"text": expected}
    assert len(expected) > 12


def test_what_does_not_fit_is_left_out(cli: Callable[..., Any], tiny: tuple[str, ...]) -> None:
    assert cli(*tiny, "sample.tokens=100000", "hydra.run.dir=long").status == 0
    assert read_record(Path("long")).sample == {}
    assert cli(*tiny, "sample.prompt=null", "hydra.run.dir=none").status == 0
    assert read_record(Path("none")).sample == {}


def test_both_models_continue_the_prompt(cli: Callable[..., Any], tiny: tuple[str, ...]) -> None:
    done = cli(*tiny, "sample.tokens=3", "hydra.run.dir=out")
    assert done.status == 0, done.err
    record = read_record(Path("out"))
    assert record.sample.keys() == {"prompt", "dense", "compressed"}
    assert record.sample["prompt"] == PROMPT


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="tokens must be a whole number of at least 1"):
        TextSample(prompt=PROMPT, tokens=0)
