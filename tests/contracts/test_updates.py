"""What every update keeps: only factors change, what is shared stays shared, in every layout, and to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bs_exp.protocols import Update
from bs_exp.testing import UpdateContract
from bs_exp.update.none import NoUpdate
from bs_exp.update.refine_blocks import RefineBlocks
from tests.support.options import option_of, options, strategy

# A few steps of training, large enough to be seen.
TRAINING = "{0}.steps=3 {0}.batch_size=4 {0}.evaluate_every=3 {0}.learning_rate=0.02 {0}.holdout=0.2"
ROWS = [
    "update=none",
    "update=refit",
    "update=refit update.mode=sequential update.gram=layer update.target=dense_outputs",
    "update=own_gram",
    "update=mixed_refit",
    f"update=lora update.rank=3 {TRAINING.format('update')}",
    # A rank above the factors' sides, and a text of its own: this one.
    f"update=lora_corpus update.rank=40 {TRAINING.format('update')} +calibration=python_docs"
    f" corpus@update.data.corpus=text update.data.corpus.files=['{Path(__file__)}'] update.data.sequence_length=24"
    " update.data.num_sequences=12",
    f"update=recover {TRAINING.format('update')}",
    f"update=refine_blocks {TRAINING.format('update')}",
    f"update=refine_blocks update.start=anchored update.trained=factors {TRAINING.format('update')}",
    "update=gradient_correction update.corrections=1 update.holdout=0.0",
    "update=natural_gradient update.steps=1",
    f"update=natural_recover update.updates.natural.steps=1 {TRAINING.format('update.updates.recover')}",
    "update=lens",
    f"update=refit_recover {TRAINING.format('update.updates.recover')}",
]


class TestUpdates(UpdateContract):
    @pytest.fixture(scope="class", params=ROWS, ids=[row[:36] for row in ROWS])
    @classmethod
    def update(cls, request: pytest.FixtureRequest) -> Any:
        return strategy(request.param)

    def changes_factors(self, update: Update) -> bool:
        return not isinstance(update, NoUpdate)

    def changes_blocks(self, update: Update) -> bool:
        return isinstance(update, RefineBlocks) and update.trained == "block"


def test_every_option_has_a_row() -> None:
    assert {option_of(row) for row in ROWS} == options("update")
