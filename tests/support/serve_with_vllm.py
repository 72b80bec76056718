"""Serves a folder with vLLM in a process of its own, and prints what came of it as a line of JSON.

argv: the folder, and a JSON object with the prompts (lists of token ids), the number of new tokens, and more arguments
of `vllm.LLM`. What is printed has, for each prompt, the new tokens and the log-probabilities of the prompt's tokens but
the first; by object, the layers that hold a factor; and how many numbers all factors store, each object counted once,
without matrices that stay dense beside factorised ones.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# In this process, so that the model can be looked at.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def _factors(model: Any) -> tuple[list[list[str]], int]:
    from bs_exp.serving.factors import Bases, Factor, PartOfLayer

    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Bases):
            holders.setdefault(id(module), []).append(name.partition(".factorised")[0])
    dense = {id(part.weight) for part in model.modules() if isinstance(part, PartOfLayer) and part.group is None}
    stored = sum(m.stored for m in model.modules() if isinstance(m, Factor) and id(m) not in dense)
    return list(holders.values()), stored


def main(folder: str, wanted: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    usual = {"max_model_len": 128, "gpu_memory_utilization": 0.1, "enable_prefix_caching": False}
    llm = LLM(folder, skip_tokenizer_init=True, **usual, **wanted["settings"])
    made = llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in wanted["prompts"]],
        SamplingParams(
            temperature=0, max_tokens=wanted["tokens"], prompt_logprobs=0, ignore_eos=True, detokenize=False
        ),
    )
    answers = [
        {
            "tokens": list(one.outputs[0].token_ids),
            "logprobs": [one.prompt_logprobs[i][prompt[i]].logprob for i in range(1, len(prompt))],
        }
        for prompt, one in zip(wanted["prompts"], made, strict=True)
    ]
    ((holders, stored),) = llm.apply_model(_factors)
    print(json.dumps({"answers": answers, "holders": holders, "stored": stored}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
