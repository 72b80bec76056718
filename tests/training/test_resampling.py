"""Resampled windows: the old tokens in pieces of a known length, the same for the same seed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bs_exp.cache import Cache
from bs_exp.errors import ConfigError
from bs_exp.models.tiny import tiny_random
from bs_exp.testing.models import QUIET, Tokens, same, updated, values
from bs_exp.training.generation import generate_windows
from bs_exp.training.resampling import MAX_PIECE_LENGTH, resample
from bs_exp.training.settings import split_windows
from bs_exp.workspace import Workspace
from tests.support.updates import RECOVERY

# Every token tells its place: token i of window w is 1000 w + i.
PLACES = 1000 * torch.arange(7)[:, None] + torch.arange(50)


def resampled(windows: Tensor = PLACES, count: int = 400, piece_length: int = 5, seed: int = 3) -> Tensor:
    return resample(windows, count, piece_length=piece_length, seed=seed)


def joints(windows: Tensor) -> Tensor:
    """Where a token is not followed as in the text; a window's end is followed by its beginning."""
    follows = torch.where(windows[:, :-1] % 1000 == 49, windows[:, :-1] - 49, windows[:, :-1] + 1)
    return windows[:, 1:] != follows


@pytest.mark.parametrize("piece_length", [1, 5, 20, 1000])
def test_pieces_have_their_length(piece_length: int) -> None:
    made = resampled(piece_length=piece_length)
    assert made.shape == (400, 50)
    assert set(made.unique().tolist()) <= set(PLACES.flatten().tolist())
    for window in joints(made)[:, 1:]:  # the first token stands alone
        ends = window.nonzero()[:, 0]
        # One piece in 350 goes on, by chance, where another ended.
        assert (ends.diff() % piece_length == 0).all()
    expected = 400 * 48 / piece_length
    assert abs(int(joints(made)[:, 1:].sum()) - expected) < 3 * expected**0.5


def test_pieces_come_from_everywhere_and_are_all_different() -> None:
    starts, counts = torch.unique(resampled()[:, 1:][joints(resampled())], return_counts=True)
    assert len(starts) == PLACES.numel()
    # Poisson: about 4300 joints at 350 places.
    assert counts.max() < 32
    assert len(resampled().unique(dim=0)) == 400
    assert len(resampled(count=6000, piece_length=1)[:, 7].unique()) == PLACES.numel()


def test_windows_begin_with_the_token_that_windows_begin_with() -> None:
    """So that a special token at the beginning of every window stays there."""
    assert set(resampled()[:, 0].tolist()) == set(PLACES[:, 0].tolist())


def test_the_seed_decides() -> None:
    assert torch.equal(resampled(), resampled())
    assert not torch.equal(resampled(), resampled(seed=4))


def test_recovery_resamples_what_its_steps_see_beyond_one_epoch() -> None:
    dense = tiny_random()
    again, anew = (updated(dense, replace(RECOVERY, steps=24, piece_length=length)) for length in (None, 6))
    whole = again.update["training_windows"]
    assert (again.update["resampled_windows"], anew.update["resampled_windows"]) == (0, 24 * 4 - whole)
    assert anew.update["training_windows"] == 24 * 4
    assert anew.update["held_out_kl_after"] < 0.95 * anew.update["held_out_kl_before"]
    assert not same(values(anew.module), values(again.module))


@pytest.mark.parametrize("blockwise_steps", [20, 3], ids="{} blockwise steps".format)
def test_every_stage_sees_whole_windows_first_of_all(blockwise_steps: int) -> None:
    """Many steps in one stage do not crowd whole windows out of the other; what no step saw is not counted."""
    report = updated(tiny_random(), replace(RECOVERY, blockwise_steps=blockwise_steps)).update
    whole = 13
    for stage, steps in ((report, 8), (report["blockwise"], blockwise_steps)):
        seen = steps * RECOVERY.batch_size
        assert (stage["training_windows"], stage["resampled_windows"]) == (seen, max(0, seen - whole))


def test_pieces_are_of_training_and_generated_windows_never_of_held_out_ones() -> None:
    """Every window that the dense model is asked about in training, and beside these only calibration windows."""
    dense, settings, ids = tiny_random(), replace(RECOVERY, generated_windows=5, seed=2), Tokens().windows(None).ids
    training, held_out = split_windows(ids, settings)
    generated = generate_windows(settings, dense, training, Workspace(Cache(None), QUIET))
    whole = torch.cat([training, generated])
    assert (len(training), len(held_out)) == (13, 3)
    made = resample(whole, 8 * 4 - 13 - 5, piece_length=6, seed=2)

    seen: set[tuple[int, ...]] = set()

    def watch(module: Any, arguments: Any, inputs: dict[str, Any]) -> None:
        if (tokens := inputs.get("input_ids")) is not None and tokens.shape[1] == ids.shape[1]:
            seen.update(map(tuple, tokens.tolist()))

    dense.module.register_forward_pre_hook(watch, with_kwargs=True)
    updated(dense, settings)
    new, calibration = (set(map(tuple, windows.tolist())) for windows in (torch.cat([generated, made]), ids))
    assert len(new) == 8 * 4 - 13 and seen - calibration == new


def test_one_epoch_needs_none() -> None:
    dense = tiny_random()
    steps = 13 // RECOVERY.batch_size
    again, anew = (updated(dense, replace(RECOVERY, steps=steps, piece_length=length)) for length in (None, 6))
    assert anew.update["resampled_windows"] == 0
    assert same(values(anew.module), values(again.module))


@pytest.mark.parametrize("wrong", [0, -3, MAX_PIECE_LENGTH + 1, 10**20], ids=repr)
def test_a_length_out_of_range_names_itself(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"^piece_length must .*{wrong}"):
        replace(RECOVERY, piece_length=wrong)


def test_the_longest_piece_is_a_whole_window() -> None:
    made = resampled(piece_length=MAX_PIECE_LENGTH)
    assert not joints(made)[:, 1:].any()
