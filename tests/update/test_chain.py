"""A chain does what its members do one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from bs_exp import strategy
from bs_exp.errors import ConfigError
from bs_exp.models.surgery import find_factors
from bs_exp.models.tiny import tiny_random
from bs_exp.testing.models import same, updated, values
from bs_exp.update.chain import UpdateChain
from bs_exp.update.none import NoUpdate


class Times:
    """Multiplies and adds, so that the order matters."""

    reads_windows = False

    def __init__(self, factor: float, extra: float) -> None:
        self.factor, self.extra, self.checked = factor, extra, 0

    def check(self, dense: object, calibration: object) -> None:
        self.checked += 1

    @torch.no_grad()
    def apply(self, compressed: Any, *others: Any) -> Mapping[str, Any]:
        for factor in find_factors(compressed).values():
            factor.mul_(self.factor).add_(self.extra)
        return {"factor": self.factor}


def test_one_after_the_other_with_a_report_each() -> None:
    dense = tiny_random()
    chain = UpdateChain(updates={"double": Times(2.0, 0.0), "add": Times(1.0, 0.5)})  # type: ignore[dict-item]
    plain, made = updated(dense, NoUpdate()), updated(dense, chain)
    before, after = find_factors(plain.module), find_factors(made.module)
    assert all(torch.equal(after[name], before[name] * 2.0 + 0.5) for name in before)
    assert made.update == {"strategy": "chain", "double": {"factor": 2.0}, "add": {"factor": 1.0}}
    assert [member.checked for member in chain.updates.values()] == [1, 1]  # type: ignore[attr-defined]


def test_of_nothing_new_is_nothing() -> None:
    dense = tiny_random()
    made = updated(dense, UpdateChain(updates={"first": NoUpdate(), "second": NoUpdate()}))
    assert same(values(made.module), values(updated(dense, NoUpdate()).module))


def test_an_empty_chain_is_refused() -> None:
    for nothing in ({}, {"first": None}):
        with pytest.raises(ConfigError, match="updates is empty"):
            UpdateChain(updates=nothing)  # type: ignore[arg-type]


def test_adapters_that_are_not_merged_come_last() -> None:
    """The update behind them starts from the factors, so that adapters beside these would be gone without a word."""
    lora = strategy("update=lora", merge=False)
    assert UpdateChain(updates={"first": NoUpdate(), "last": lora}).updates["last"] is lora
    with pytest.raises(ConfigError, match=r"updates\.first\.merge must be true, or first the last of the chain"):
        UpdateChain(updates={"first": lora, "second": NoUpdate()})


def test_null_leaves_an_update_out_and_a_value_is_none() -> None:
    update = NoUpdate()
    assert UpdateChain(updates={"first": None, "second": update}).updates == {"second": update}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"updates\.first must be an update.*got 'lora'"):
        UpdateChain(updates={"first": "lora"})  # type: ignore[dict-item]
