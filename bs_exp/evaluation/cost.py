"""What compression costs, against what it saves afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bs_exp.records.metrics import BREAK_EVEN, COMPRESSION_SECONDS


def break_even_tokens(seconds: float, dense: float, compressed: float) -> float:
    """Tokens after which the time that the faster model saves is the time that compressing it took.

    Rates are tokens per second, above 0; infinite where the compressed model is not faster.
    """
    saved = 1.0 / dense - 1.0 / compressed
    return seconds / saved if saved > 0 else math.inf


def measure_cost(seconds: float, dense: Mapping[str, Any], compressed: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a compression and its break-even for each rate of throughput; empty where none was measured."""
    cost = {
        name: break_even_tokens(seconds, dense[rate], compressed[rate])
        for rate, name in BREAK_EVEN.items()
        if rate in dense and rate in compressed
    }
    return {COMPRESSION_SECONDS: seconds, **cost} if cost else {}
