"""Windows cut anew: the old tokens in pieces of a known length, the same for the same seed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bs_exp.errors import ConfigError
from bs_exp.models.tiny import tiny_random
from bs_exp.training.course import Course
from bs_exp.training.resampling import cut_anew
from bs_exp.update import recover
from tests.support.updates import RECOVERY, Tokens, same, updated, values

# Every token tells its place: token i of window w is 1000 w + i.
PLACES = 1000 * torch.arange(7)[:, None] + torch.arange(50)


def cut(windows: Tensor = PLACES, count: int = 400, piece_length: int = 5, seed: int = 3) -> Tensor:
    return cut_anew(windows, count, piece_length=piece_length, seed=seed)


def joints(windows: Tensor) -> Tensor:
    """Where a token is not followed as in the text; a window's end is followed by its beginning."""
    follows = torch.where(windows[:, :-1] % 1000 == 49, windows[:, :-1] - 49, windows[:, :-1] + 1)
    return windows[:, 1:] != follows


@pytest.mark.parametrize("piece_length", [1, 5, 20, 1000])
def test_pieces_have_their_length(piece_length: int) -> None:
    made = cut(piece_length=piece_length)
    assert made.shape == (400, 50)
    assert set(made.unique().tolist()) <= set(PLACES.flatten().tolist())
    for window in joints(made)[:, 1:]:  # the first token stands alone
        ends = window.nonzero()[:, 0]
        # One piece in 350 goes on, by chance, where another ended.
        assert (ends.diff() % piece_length == 0).all()
    expected = 400 * 48 / piece_length
    assert abs(int(joints(made)[:, 1:].sum()) - expected) < 3 * expected**0.5


def test_pieces_come_from_everywhere_and_are_all_different() -> None:
    starts, counts = torch.unique(cut()[:, 1:][joints(cut())], return_counts=True)
    assert len(starts) == PLACES.numel()
    # Poisson: about 4300 joints at 350 places.
    assert counts.max() < 32
    assert len(cut().unique(dim=0)) == 400
    assert len(cut(count=6000, piece_length=1)[:, 7].unique()) == PLACES.numel()


def test_windows_begin_with_the_token_that_windows_begin_with() -> None:
    """So that a special token at the beginning of every window stays there."""
    assert set(cut()[:, 0].tolist()) == set(PLACES[:, 0].tolist())


def test_the_seed_decides() -> None:
    assert torch.equal(cut(), cut())
    assert not torch.equal(cut(), cut(seed=4))


def test_recovery_cuts_what_its_steps_see_beyond_one_epoch() -> None:
    dense = tiny_random()
    again, anew = (updated(dense, replace(RECOVERY, steps=24, piece_length=length)) for length in (None, 6))
    whole = again.update["training_windows"]
    assert (again.update["cut_windows"], anew.update["cut_windows"]) == (0, 24 * 4 - whole)
    assert anew.update["training_windows"] == 24 * 4
    assert anew.update["held_out_kl_after"] < 0.95 * anew.update["held_out_kl_before"]
    assert not same(values(anew.module), values(again.module))


@pytest.mark.parametrize("blockwise_steps", [20, 3], ids="{} blockwise steps".format)
def test_every_stage_sees_whole_windows_first_of_all(blockwise_steps: int) -> None:
    """Many steps in one stage do not crowd whole windows out of the other."""
    report = updated(tiny_random(), replace(RECOVERY, blockwise_steps=blockwise_steps)).update
    whole = 13
    for stage, steps in ((report, 8), (report["blockwise"], blockwise_steps)):
        seen = max(whole, steps * RECOVERY.batch_size)
        assert (stage["training_windows"], stage["cut_windows"]) == (seen, seen - whole)


def test_pieces_are_of_training_and_written_windows_never_of_held_out_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Tensor, int, dict[str, int]]] = []

    def spy(windows: Tensor, count: int, **settings: int) -> Tensor:
        calls.append((windows, count, settings))
        return cut_anew(windows, count, **settings)

    monkeypatch.setattr(recover, "cut_anew", spy)
    settings = replace(RECOVERY, generated=5, seed=2)
    updated(tiny_random(), settings)
    training, held_out = Course.of(settings).split(Tokens().windows(None).ids)
    ((windows, count, given),) = calls
    assert count == 8 * 4 - 13 - 5 and given == {"piece_length": 6, "seed": 2}
    assert len(windows) == 13 + 5 and torch.equal(windows[:13], training)
    assert len(held_out) == 3
    assert not (windows[:, None] == held_out).all(-1).any()


def test_one_epoch_needs_none() -> None:
    dense = tiny_random()
    steps = 13 // RECOVERY.batch_size
    again, anew = (updated(dense, replace(RECOVERY, steps=steps, piece_length=length)) for length in (None, 6))
    assert anew.update["cut_windows"] == 0
    assert same(values(anew.module), values(again.module))


@pytest.mark.parametrize("wrong", [0, -3], ids=repr)
def test_a_length_out_of_range_names_itself(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"^piece_length must .*{wrong}"):
        replace(RECOVERY, piece_length=wrong)
