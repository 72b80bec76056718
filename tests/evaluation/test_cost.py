"""Break-even: the tokens after which the time saved equals the time that compression took."""

from __future__ import annotations

import math

import pytest

from bs_exp.evaluation.cost import break_even_tokens, measure_cost


def test_break_even_is_where_both_have_taken_the_same_time() -> None:
    dense = {"throughput/prefill_tok_s": 100.0, "throughput/decode_tok_s": 10.0}
    compressed = {"throughput/prefill_tok_s": 150.0, "throughput/decode_tok_s": 10.0}
    cost = measure_cost(60.0, dense, compressed)
    tokens = cost["cost/break_even_prefill_tokens"]
    assert 60.0 + tokens / 150.0 == pytest.approx(tokens / 100.0)
    assert cost["cost/break_even_decode_tokens"] == math.inf
    assert cost["cost/compression_s"] == 60.0


def test_nothing_without_throughput() -> None:
    assert measure_cost(60.0, {"ppl/text": 1.0}, {"ppl/text": 2.0}) == {}


def test_break_even_is_where_the_time_saved_is_the_time_spent() -> None:
    tokens = break_even_tokens(60.0, 100.0, 150.0)
    assert tokens / 100.0 == pytest.approx(60.0 + tokens / 150.0)
    assert break_even_tokens(60.0, 100.0, 100.0) == math.inf
    assert break_even_tokens(60.0, 100.0, 50.0) == math.inf
