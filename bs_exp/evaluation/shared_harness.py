"""The LM Evaluation Harness on the processes of one run: each answers its share of the requests."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, groupby
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from bs_exp import processes


class SharedHarness(HFLM):  # type: ignore[misc]  # lm-eval carries no types
    """A model in memory, which each process has. All build the same requests, and all get all answers.

    The harness' own way, to share out items before requests are built, draws other examples for the prompts than a
    single process does.
    """

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return _shared_out(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return _shared_out(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return _shared_out(super().generate_until, requests, disable_tqdm)


def _shared_out(answer: Callable[..., list[Any]], requests: list[Instance], disable_tqdm: bool) -> list[Any]:
    """Requests of one item with one context stay together: the harness computes it once for all of them."""
    together = [
        list(same) for _, same in groupby(requests, key=lambda each: (each.task_name, each.doc_id, each.args[0]))
    ]
    own = processes.mine(together)
    asked = list(chain.from_iterable(own))
    found = iter(answer(asked, disable_tqdm=disable_tqdm or not processes.is_first()) if asked else ())
    answers = [[next(found) for _ in same] for same in own]
    return list(chain.from_iterable(processes.put_together(answers, len(together))))
