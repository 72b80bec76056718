"""Run in a fresh process that cannot import bs_exp: what a user of plain transformers sees. Prints one JSON object."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.modules["bs_exp"] = None  # type: ignore[assignment]  # any import of it fails, as where it is not installed

folder = Path(sys.argv[1])
expected = torch.load(folder / "logits.pt")
ids = torch.arange(24).view(2, 12)


def loaded_logits(kind: str, family: str, **options: bool) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder / kind / family, **options)
    with torch.no_grad():
        return model(ids).logits


def refusal(family: str) -> str | None:
    try:
        loaded_logits("compressed", family)
    except ValueError as error:
        return str(error)
    return None


def refusal_of_native_class(**options: bool) -> str | None:
    from transformers import LlamaForCausalLM

    try:
        LlamaForCausalLM.from_pretrained(folder / "compressed" / "llama", **options)
    except ValueError as error:
        return str(error)
    return None


def harness_answer(path: Path, **options: bool) -> str:
    from lm_eval.models.huggingface import HFLM

    try:
        model = HFLM(pretrained=str(path), device="cpu", batch_size=1, **options)
    except ValueError as error:
        return str(error)
    from lm_eval.api.instance import Instance

    request = Instance(request_type="loglikelihood", doc={}, arguments=("A word", " or two"), idx=0)
    (likelihood, _greedy), *_ = model.loglikelihood([request], disable_tqdm=True)
    return f"{likelihood:.3f}"


# trust_remote_code registers the plug-in for the rest of the process, so these come first
refusals = {family: refusal(family) for family in expected["compressed"]}
refusals["native class"] = refusal_of_native_class()
refusals["sizes ignored"] = refusal_of_native_class(ignore_mismatched_sizes=True)
dense = {family: torch.equal(loaded_logits("dense", family), logits) for family, logits in expected["dense"].items()}
some = folder / "compressed" / "llama"
harness_without = harness_answer(some)
trusted = {
    family: torch.equal(loaded_logits("compressed", family, trust_remote_code=True), logits)
    for family, logits in expected["compressed"].items()
}


def adapters() -> bool:
    """Whether peft adapts matrices by their usual names, and merges that, with the file in the folder alone."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(some, trust_remote_code=True)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    with torch.no_grad():
        logits = adapted(ids).logits
        merged = adapted.merge_and_unload()(ids).logits
    changed = not torch.allclose(logits, expected["compressed"]["llama"], atol=1e-2)
    return changed and torch.allclose(merged, logits, rtol=1e-4, atol=1e-4)


print(
    json.dumps(
        {
            "adapters": adapters(),
            "refusals": refusals,
            "dense": dense,
            "trusted": trusted,
            "resaved": torch.equal(
                loaded_logits("resaved", "llama", trust_remote_code=True), expected["compressed"]["llama"]
            ),
            "harness_without": harness_without,
            "harness": harness_answer(some, trust_remote_code=True),
        }
    )
)
