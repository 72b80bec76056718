"""The time that compression takes, and after how many tokens the compressed model has saved as much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bs_exp.records.metrics import BREAK_EVEN, COMPRESSION_SECONDS, measured_speedup


def break_even_tokens(seconds: float, dense: float, compressed: float) -> float:
    """Tokens after which the time that the faster model saves is the time that compressing it took.

    Rates are tokens per second, above 0; infinite where the compressed model is not faster.
    """
    saved = 1.0 / dense - 1.0 / compressed
    return seconds / saved if saved > 0 else math.inf


def measure_cost(seconds: float, dense: Mapping[str, Any], compressed: Mapping[str, Any]) -> dict[str, float]:
    """`cost/compression_s`, and as `cost/break_even_*_tokens` after how many tokens as many seconds are saved.

    `dense` and `compressed` are metrics by name. There is no such number of tokens where no difference of speed was
    measured. Where throughput was not measured, the result is empty.
    """
    cost: dict[str, float] = {}
    for rate, name in BREAK_EVEN.items():
        if rate in dense and rate in compressed:
            cost[COMPRESSION_SECONDS] = seconds
            speedup = measured_speedup(compressed, rate)
            if speedup is not None:
                cost[name] = break_even_tokens(seconds, dense[rate], dense[rate] * speedup)
    return cost
