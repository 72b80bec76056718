"""What compression costs, against what it saves afterwards."""

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
    """Seconds of a compression, and after how many tokens the faster model has saved as many.

    Infinite where the compressed model is not faster; empty where throughput was not measured.
    """
    cost: dict[str, float] = {}
    for rate, name in _RATES.items():
        if rate in dense and rate in compressed:
            saved = 1.0 / dense[rate] - 1.0 / compressed[rate]
            cost[name] = seconds / saved if saved > 0 else math.inf
    return {"cost/compression_s": seconds, **cost} if cost else {}
