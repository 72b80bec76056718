"""One rule for windows: tokenised whole, cut from the start, remainder dropped or kept."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from bs_exp.corpora.windows import CalibrationSet, check_fits, cut_windows, special_tokens_around, tokenize
from bs_exp.errors import ConfigError, DataError
from bs_exp.models.tiny import byte_tokenizer, tiny_random
from bs_exp.types import LoadedModel, TokenWindows

# One token per byte: token counts are characters.
TOKENIZER = byte_tokenizer()
TEXT = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Fixed:
    text: str

    def read(self) -> tuple[str, dict[str, object]]:
        return self.text, {"corpus": "fixed", "fingerprint": "0"}


def _texts(windows: TokenWindows) -> list[str]:
    return [TOKENIZER.decode(row) for row in windows.ids]


def _calibration(text: str = TEXT, **settings: Any) -> CalibrationSet:
    defaults: dict[str, Any] = {
        "num_sequences": "all",
        "sequence_length": 5,
        "order": "sequential",
        "batch_size": 2,
        "seed": 0,
        "special_tokens": False,
    }
    return CalibrationSet(corpus=Fixed(text), **{**defaults, **settings})


def test_windows_follow_each_other_from_the_start_and_the_remainder_is_dropped() -> None:
    windows = cut_windows(TEXT, TOKENIZER, sequence_length=10)
    assert _texts(windows) == ["abcdefghij", "klmnopqrst"]
    assert windows.tail is None
    assert windows.provenance["tokens"] == 26
    assert windows.provenance["available"] == windows.provenance["windows"] == 2


def test_the_tail_is_kept_on_demand() -> None:
    kept = cut_windows(TEXT, TOKENIZER, sequence_length=10, tail="keep")
    assert kept.tail is not None and TOKENIZER.decode(kept.tail) == "uvwxyz"
    assert cut_windows(TEXT, TOKENIZER, sequence_length=13, tail="keep").tail is None


def test_a_stride_makes_windows_overlap_and_the_tail_holds_new_tokens_only_if_there_are_any() -> None:
    windows = cut_windows(TEXT, TOKENIZER, sequence_length=10, stride=6, tail="keep")
    assert _texts(windows) == ["abcdefghij", "ghijklmnop", "mnopqrstuv"]
    assert windows.tail is not None and TOKENIZER.decode(windows.tail) == "stuvwxyz"
    assert cut_windows(TEXT, TOKENIZER, sequence_length=10, stride=8, tail="keep").tail is None  # ends with z


def test_sequential_takes_the_first_windows() -> None:
    assert _texts(_calibration(num_sequences=2).windows(TOKENIZER)) == ["abcde", "fghij"]


def test_random_is_a_seeded_permutation_of_the_same_windows() -> None:
    every = _texts(_calibration().windows(TOKENIZER))
    shuffled = _texts(_calibration(order="random").windows(TOKENIZER))
    assert sorted(shuffled) == sorted(every) and shuffled != every
    assert _texts(_calibration(order="random", num_sequences=3).windows(TOKENIZER)) == shuffled[:3]
    assert _texts(_calibration(order="random", seed=1).windows(TOKENIZER)) != shuffled


def test_the_global_generator_is_neither_used_nor_moved() -> None:
    torch.manual_seed(1)
    first = _calibration(order="random").windows(TOKENIZER)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(2)
    assert torch.equal(_calibration(order="random").windows(TOKENIZER).ids, first.ids)


def test_the_hash_follows_ids_and_shape_and_nothing_else() -> None:
    def hashed(**settings: Any) -> str:
        return str(_calibration(**settings).windows(TOKENIZER).provenance["sha256"])

    assert hashed() == hashed(text=TEXT[:25] + "!", seed=3, batch_size=1)
    different = [
        hashed(),
        hashed(text=TEXT[:24] + "!"),
        hashed(num_sequences=2),
        hashed(num_sequences=1, sequence_length=10),
        hashed(order="random"),
    ]
    assert len(set(different)) == len(different)


def test_provenance_tells_corpus_and_cut() -> None:
    provenance = _calibration(num_sequences=3, order="random", seed=7).windows(TOKENIZER).provenance
    assert provenance["corpus"] == {"corpus": "fixed", "fingerprint": "0"}
    assert (provenance["tokens"], provenance["available"], provenance["windows"]) == (26, 5, 3)
    assert (provenance["order"], provenance["seed"]) == ("random", 7)


def test_special_tokens_come_once_and_only_if_asked_for() -> None:
    tokenizer = _with_special_tokens("BOS $A")
    begin = tokenizer.bos_token_id
    plain = tokenize(TEXT, tokenizer, special_tokens=False)
    special = tokenize(TEXT, tokenizer, special_tokens=True)
    assert special.tolist() == [begin, *plain.tolist()]


def _with_special_tokens(template: str) -> PreTrainedTokenizerFast:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    pairs = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (tokenizer.bos_token, tokenizer.eos_token)]
    template = template.replace("BOS", tokenizer.bos_token).replace("EOS", tokenizer.eos_token)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=pairs)
    return tokenizer


@pytest.mark.parametrize(
    ("template", "before", "after"), [("BOS $A", 1, 0), ("BOS $A EOS", 1, 1), ("$A EOS", 0, 1), ("$A", 0, 0)]
)
def test_every_window_has_the_special_tokens(template: str, before: int, after: int) -> None:
    """Oracle: the tokenizer's own special tokens around the text of each window."""
    tokenizer = _with_special_tokens(template)
    length = 5 - before - after
    windows = cut_windows(TEXT, tokenizer, sequence_length=5, special_tokens="per_window", tail="keep")
    pieces = [TEXT[i : i + length] for i in range(0, len(TEXT), length)]
    expected = [tokenizer(piece)["input_ids"] for piece in pieces]
    assert [len(ids) for ids in special_tokens_around(tokenizer)] == [before, after]
    whole = len(TEXT) // length
    assert windows.ids.tolist() == expected[:whole] and windows.ids.shape[1] == 5
    assert (windows.tail is None) == (len(expected) == whole)
    if windows.tail is not None:
        assert windows.tail.tolist() == expected[whole]
    assert windows.provenance["special_tokens"] == "per_window"
    if not before and not after:
        plain = cut_windows(TEXT, tokenizer, sequence_length=5, tail="keep")
        assert torch.equal(windows.ids, plain.ids) and windows.provenance["sha256"] == plain.provenance["sha256"]


def test_calibration_windows_have_them_too_and_overlap_by_what_they_hold() -> None:
    tokenizer = _with_special_tokens("BOS $A")
    windows = _calibration(num_sequences=6, special_tokens="per_window").windows(tokenizer).ids
    assert windows.shape == (6, 5) and set(windows[:, 0].tolist()) == {tokenizer.bos_token_id}
    ids = tokenize(TEXT, tokenizer, special_tokens=False)
    assert torch.equal(windows[:, 1:].flatten(), ids[:24])
    half = cut_windows(TEXT, tokenizer, sequence_length=5, special_tokens="per_window", stride=2).ids
    assert torch.equal(half[1:, 1:3], half[:-1, 3:])


def test_what_special_tokens_leave_no_room_for_is_refused() -> None:
    tokenizer = _with_special_tokens("BOS $A EOS")
    with pytest.raises(DataError, match="must be above 2, the number of special tokens"):
        cut_windows(TEXT, tokenizer, sequence_length=2, special_tokens="per_window")
    with pytest.raises(ConfigError, match="stride must be at most 3"):
        cut_windows(TEXT, tokenizer, sequence_length=5, special_tokens="per_window", stride=4)


@pytest.mark.parametrize("value", ["always", None, 1, "true"])
def test_special_tokens_have_three_settings(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"special_tokens must be true .*, false or per_window, got"):
        _calibration(special_tokens=value)


def test_a_text_too_short_says_how_many_tokens_were_found_and_needed() -> None:
    with pytest.raises(DataError, match="26 tokens found, 2,048 needed"):
        _calibration(sequence_length=2048).windows(TOKENIZER)


def test_too_many_windows_say_how_many_there_are() -> None:
    with pytest.raises(DataError, match=r"8 windows of 5 tokens need 40 tokens.*has 26, enough for 5"):
        _calibration(num_sequences=8).windows(TOKENIZER)


def test_a_long_text_is_tokenised_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 8
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, library.name):  # a run in this process may have made it silent
            tokenize(TEXT, tokenizer, special_tokens=False)
            assert not caplog.records
            tokenizer(TEXT)  # the warning exists, and would have been seen
            assert caplog.records
    finally:
        library.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_sequences": 0}, "num_sequences must be a whole number of at least 1, got 0.*all"),
        ({"num_sequences": "some"}, "num_sequences .* got 'some'"),
        ({"num_sequences": True}, "num_sequences"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"batch_size": -1}, "batch_size"),
        ({"order": "backwards"}, "order must be one of sequential, random, got 'backwards'"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _calibration(**settings)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_random("llama", layers=1)


def test_windows_longer_than_the_context_do_not_fit(model: LoadedModel) -> None:
    check_fits(cut_windows("x" * 512, TOKENIZER, sequence_length=512), model)
    with pytest.raises(ConfigError, match="sequence_length is 513, but the model has 512 positions"):
        check_fits(cut_windows("x" * 513, TOKENIZER, sequence_length=513), model)


def test_a_tokenizer_of_another_model_does_not_fit(model: LoadedModel) -> None:
    windows = cut_windows(TEXT, TOKENIZER, sequence_length=10, tail="keep")
    assert windows.tail is not None
    for wrong in (replace(windows, ids=windows.ids + 250), replace(windows, tail=windows.tail + 250)):
        with pytest.raises(DataError, match="embeds ids below 258"):
            check_fits(wrong, model)
