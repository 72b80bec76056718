"""Run in a fresh process: what a user sees who imports bs_exp. Prints one JSON object."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bs_exp

folder = Path(sys.argv[1])
expected = torch.load(folder / "logits.pt")
ids = torch.arange(24).view(2, 12)
seen: dict[str, dict[str, object]] = {}
for family, logits in expected["compressed"].items():
    path = folder / "compressed" / family
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        again = model(ids).logits
    prompt = tokenizer("A word", return_tensors="pt").input_ids
    made = model.generate(prompt, max_new_tokens=3, do_sample=False)
    layers = [m for m in model.modules() if isinstance(m, bs_exp.SharedLinear | bs_exp.PivotedLinear)]
    assert "peft" not in sys.modules  # it is imported last, and finds the layers all the same
    seen[family] = {
        "equal": torch.equal(again, logits),
        "prompt": tokenizer.decode(made[0, : prompt.shape[1]]),
        "generated": made.shape[1] - prompt.shape[1],
        "layers": len(layers),
        "bases": len({id(layer.basis) for layer in layers}),
    }
from peft import LoraConfig, get_peft_model  # noqa: E402

some = AutoModelForCausalLM.from_pretrained(folder / "compressed" / "llama")
adapted = get_peft_model(some, LoraConfig(target_modules=["q_proj"]))
print(json.dumps({**seen, "adapters": sum(".lora_A." in name for name, _ in adapted.named_parameters())}))
