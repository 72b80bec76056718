"""The time that compression takes, and after how many tokens the compressed model has saved as much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Metric of throughput -> name of the break-even.
_RATES = {
    "throughput/prefill_tok_s": "cost/break_even_prefill_tokens",
    "throughput/decode_tok_s": "cost/break_even_decode_tokens",
}


def measure_cost(seconds: float, dense: Mapping[str, Any], compressed: Mapping[str, Any]) -> dict[str, float]:
    """`cost/compression_s`, and as `cost/break_even_*_tokens` after how many tokens as many seconds are saved.

    `dense` and `compressed` are metrics by name. A break-even is infinite if the compressed model is not faster. Where
    throughput was not measured, the result is empty.
    """
    cost: dict[str, float] = {}
    for rate, name in _RATES.items():
        if rate in dense and rate in compressed:
            saved = 1.0 / dense[rate] - 1.0 / compressed[rate]
            cost[name] = seconds / saved if saved > 0 else math.inf
    return {"cost/compression_s": seconds, **cost} if cost else {}
