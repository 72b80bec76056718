"""Break-even: the tokens after which the time saved equals the time that compression took."""

from __future__ import annotations

import math

import pytest

from bs_exp.evaluation.cost import break_even_tokens, measure_cost


def test_break_even_is_where_both_have_taken_the_same_time() -> None:
    dense = {"throughput/prefill_tok_s": 100.0, "throughput/decode_tok_s": 10.0}
    compressed = {
        "throughput/prefill_tok_s": 140.0,  # the medians' ratio is not what counts
        "throughput/prefill_tok_s_speedup": 1.5,
        "throughput/prefill_tok_s_difference": "faster",
        "throughput/decode_tok_s": 9.0,
        "throughput/decode_tok_s_speedup": 0.9,
        "throughput/decode_tok_s_difference": "slower",
    }
    cost = measure_cost(60.0, dense, compressed)
    tokens = cost["cost/break_even_prefill_tokens"]
    assert tokens / 100.0 == pytest.approx(60.0 + tokens / 150.0)
    assert cost["cost/break_even_decode_tokens"] == math.inf
    assert cost["cost/compression_s"] == 60.0


def test_no_break_even_where_no_difference_was_measured() -> None:
    rates = {"throughput/prefill_tok_s": 100.0, "throughput/decode_tok_s": 10.0}
    undecided = {
        "throughput/prefill_tok_s_speedup": 1.5,
        "throughput/prefill_tok_s_difference": "no difference measured",
    }
    assert measure_cost(60.0, rates, {**rates, **undecided}) == {"cost/compression_s": 60.0}


def test_nothing_without_throughput() -> None:
    assert measure_cost(60.0, {"ppl/text": 1.0}, {"ppl/text": 2.0}) == {}


def test_break_even_is_where_the_time_saved_is_the_time_spent() -> None:
    tokens = break_even_tokens(60.0, 100.0, 150.0)
    assert tokens / 100.0 == pytest.approx(60.0 + tokens / 150.0)
    assert break_even_tokens(60.0, 100.0, 100.0) == math.inf
    assert break_even_tokens(60.0, 100.0, 50.0) == math.inf
